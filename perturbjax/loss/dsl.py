r"""Deep self-learning (DSL): each sample also gets the class whose prototypes its features are most alike.

    (1 − α) · ℓ + α · CE(p, ŷ),   ŷ_i = argmax_c mean_l cos(a_i, prototype_{c,l});       α = 0 in the first part of training

Prototypes are chosen whenever an epoch begins, class by class, among its latest features a, with S_ij = cos(a_i, a_j):

    ρ_i = #{j: S_ij > S_cut},   S_cut at 40 % from the top of all S;       η_i = max_{j: ρ_j > ρ_i} S_ij   (densest: min_j S_ij)

the 8 densest with η_i < 0.95: typical, and unlike each other. ŷ comes from the features of the pass at hand instead of a further one
over all the data between epochs (our reading), and the latest n features of a class, as training saw them, stand for n random ones.
Source: Han, Luo, Wang, "Deep Self-Learning From Noisy Labels", ICCV 2019.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, is_traced
from perturbjax.classes import AxisName, gather, own_entries, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.projection import unit
from perturbjax.rounding import rounded_down


class DSLState(NamedTuple):
    """What the next step needs; n features of each class at most, L prototypes."""

    features: jax.Array  # [C, n, d], the latest features of each class, of length 1
    count: jax.Array  # [C] int32, how many were ever written; number i stands in row i mod n
    prototypes: jax.Array  # [C, L, d]
    chosen: jax.Array  # [C, L] bool, which of them there are


def choose_prototypes(
    features: jax.Array, valid: jax.Array, *, number: int = 8, cut: ArrayLike = 0.4, alike: ArrayLike = 0.95
) -> tuple[jax.Array, jax.Array]:
    """(prototypes [L, d], which of them there are [L]) of one class.

    Args:
      features: [n, d], of length 1. valid: [n], which rows hold any.
      number: L, at most n. cut: place of S_cut, as a share from the top. alike: largest η of a prototype; the densest is always one.
    """
    pair = valid[:, None] & valid[None]
    similarity = jnp.matmul(features, features.T, precision=jax.lax.Precision.HIGHEST)
    above = pair & (similarity > _from_the_top(similarity, pair, cut))
    density = jnp.where(valid, above.sum(axis=1, dtype=jnp.int32), -1)
    denser = pair & (density[None] > density[:, None])
    nearest = jnp.max(jnp.where(denser, similarity, -jnp.inf), axis=1)
    farthest = jnp.min(jnp.where(pair, similarity, jnp.inf), axis=1)
    eta = jnp.where(density == density.max(), farthest, nearest)
    apart = valid & ((eta < alike) | (jnp.arange(valid.shape[0], dtype=jnp.int32) == jnp.argmax(density).astype(jnp.int32)))
    score, best = jax.lax.top_k(jnp.where(apart, density, -1), number)
    return features[best], score >= 0


def _from_the_top(values: jax.Array, valid: jax.Array, share: ArrayLike) -> jax.Array:
    """The value in [−1, 1] that a share of the valid ones exceed: by halving an interval, many times faster than sorting all pairs."""
    number = rounded_down(jnp.asarray(share, values.dtype) * jnp.sum(valid, dtype=values.dtype)).astype(jnp.int32)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        too_many = jnp.sum(valid & (values > middle), dtype=jnp.int32) > number
        return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

    edge = jnp.asarray(1.001, values.dtype)
    return jax.lax.fori_loop(0, 40, halve, (-edge, edge))[1]


def prototype_labels(features: jax.Array, prototypes: jax.Array, chosen: jax.Array) -> jax.Array:
    """ŷ = argmax_c mean_l cos(a, prototype_{c,l}): [B], from features [B, d], prototypes [C, L, d] of length 1, chosen [C, L].

    Classes without prototypes are left out.

    >>> axes = jnp.eye(2)[:, None]  # one prototype for each of two classes
    >>> print(prototype_labels(jnp.array([[3.0, 1.0], [0.0, 2.0]]), axes, jnp.ones([2, 1], bool)))
    [0 1]
    """
    number = jnp.maximum(chosen.sum(axis=1), 1).astype(prototypes.dtype)
    # The mean of the cosines is the product with the mean prototype.
    mean = jnp.sum(jnp.where(chosen[..., None], prototypes, 0), axis=1) / number[:, None]
    likeness = jnp.matmul(unit(features.astype(mean.dtype)), mean.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(jnp.where(chosen.any(axis=1)[None], likeness, -jnp.inf), axis=-1).astype(jnp.int32)


def remember(state: DSLState, features: jax.Array, labels: jax.Array, *, axis_name: AxisName = None) -> DSLState:
    """The state with the batch's features [B, d] written over the oldest ones of their classes."""
    features = unit(wide(jax.lax.stop_gradient(features))).astype(state.features.dtype)
    features, labels = gather(features, axis_name), gather(labels, axis_name)  # all devices write the same rows
    num_classes, size, _ = state.features.shape
    member = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
    total = member.sum(axis=0, dtype=jnp.int32)
    earlier = jnp.sum((jnp.cumsum(member, axis=0) - member) * member, axis=1, dtype=jnp.int32)  # of its class in the batch
    own = lambda x: x.at[labels].get(mode="clip")
    row = jnp.where(earlier >= own(total) - size, (own(state.count) + earlier) % size, size)  # more than n: only the last n
    written = state.features.at[labels, row].set(features, mode="drop", wrap_negative_indices=False)
    return state._replace(features=written, count=state.count + total)


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Han et al., ICCV 2019", off=dict(weight=0.0),
)  # fmt: skip
def dsl(
    *, weight: ArrayLike = 0.5, start: ArrayLike = 1 / 3, num_samples: int = 320, num_prototypes: int = 8,
    cut: ArrayLike = 0.4, alike: ArrayLike = 0.95,
) -> Perturbation:  # fmt: skip
    """Deep self-learning: trains on the given label and on the one that prototypes of the classes' features suggest, for noisy labels.

    Needs the site "features". In the first epoch there are no prototypes yet.

    Args:
      weight: α of the suggested label. start: share of training after which it counts (our choice; the paper counts epochs).
      num_samples: features kept of each class; their similarities, num_samples² numbers a class, are computed once an epoch. The paper
        takes up to 1280, sixteen times the work: dsl(num_samples=1280).
      num_prototypes: L. cut, alike: see `choose_prototypes`.

    Metrics: corrected, the share of samples whose suggested label is another one than theirs.
    """
    check_number("dsl", low=0, high=1, weight=weight, start=start, cut=cut)
    check_number("dsl", low=1, num_samples=num_samples, num_prototypes=num_prototypes)
    check_number("dsl", low=-1, high=1, alike=alike)

    def init(context: Context) -> DSLState:
        dimension, classes = context.features_size(), context.num_classes
        unknown = context.class_counts is None or is_traced(context.class_counts)
        most = num_samples if unknown else int(np.max(np.asarray(context.class_counts)))
        size = max(min(num_samples, most), num_prototypes)
        empty = lambda n: jnp.zeros([classes, n, dimension], context.dtype)
        none = jnp.zeros([classes, num_prototypes], bool)
        return DSLState(empty(size), jnp.zeros([classes], jnp.int32), empty(num_prototypes), none)

    def choose(state: DSLState) -> tuple[jax.Array, jax.Array]:
        filled = jnp.arange(state.features.shape[1], dtype=jnp.int32)[None] < state.count[:, None]
        of_class = lambda one: choose_prototypes(*one, number=num_prototypes, cut=cut, alike=alike)
        return jax.lax.map(of_class, (state.features, filled))  # one class after the other, for memory

    def apply(flow: Flow, rest: Rest, state: DSLState, context: Context):
        keep = lambda state: (state.prototypes, state.chosen)
        due = context.epoch_begins() & (jnp.asarray(context.step) > 0)
        prototypes, chosen = jax.lax.cond(due, choose, keep, state)
        state = state._replace(prototypes=prototypes, chosen=chosen)

        features, log_p = jax.lax.stop_gradient(flow.trace["features"]), flow.trace["prediction"]
        suggested = prototype_labels(features, prototypes, chosen)
        other = -own_entries(log_p, suggested)
        active = context.begun(start) & chosen.any()
        alpha = jnp.where(active, jnp.asarray(weight, log_p.dtype), 0)
        losses = (1 - alpha) * flow.value + alpha * other
        corrected = jnp.where(chosen.any(), jnp.mean((suggested != flow.labels.astype(jnp.int32)).astype(jnp.float32)), 0)
        state = remember(state, features, flow.labels, axis_name=context.axis_name)
        return flow._replace(value=losses), state, {"corrected": corrected}

    return Perturbation("loss", init, apply, needs=("features",))
