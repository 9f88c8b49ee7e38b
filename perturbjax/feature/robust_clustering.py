r"""Robust clustering (RC): every sample may move by an outlier vector o_i, which costs its length: few do, those far from their centre.

    min_{m, ω, o} Σ_i Σ_c ω_ic ( ‖x_i + o_i − m_c‖² + λ‖o_i‖ );      o_i = −r_i · max(0, 1 − λ/(2‖r_i‖)),   r_i = x_i − m_c

so x_i + o_i lies at most λ/2 from its centre. `robust_kmeans` clusters; the method is our reading of it for a classifier: m_c is the
running mean of the class's features, and the head sees a_i + o_i. Its λ/2 is, if not given, the running quantile of ‖r_i‖.
Source: Forero, Kekatos, Giannakis, "Robust Clustering Using Outlier-Sparsity Regularization", IEEE TSP 2012; taxonomy eq. 11.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import RunningMean, class_count, class_mean, gather, running_mean_init, running_mean_update, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.projection import group_norm, per_group


def outlier_vectors(residuals: jax.Array, weight: ArrayLike) -> jax.Array:
    """argmin_o ‖r + o‖² + λ‖o‖ for each row of the residuals [B, ...], in at least float32.

    >>> print(outlier_vectors(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 2.0))
    [[-2.4 -3.2]
     [-0.  -0. ]]
    """
    r = wide(residuals)
    length = group_norm(r)
    share = jnp.asarray(weight, r.dtype) / (2 * jnp.where(length > 0, length, 1))
    return -r * per_group(jnp.where(length > 0, jnp.maximum(1 - share, 0), 0), r)


def robust_kmeans(
    points: jax.Array, centers: jax.Array, *, weight: ArrayLike, num_steps: int = 20
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(centres [K, d], the centre of each point [N] int32, outlier vectors [N, d]) after so many rounds of the three minimisations.

    Args:
      points: [N, d].
      centers: [K, d], to start from; one that loses all its points stays where it is.
      weight: λ; inf: k-means.
      num_steps: rounds.
    """
    x, number = wide(points), centers.shape[0]

    def nearest(m: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The cost at the best o grows with the distance alone, so the nearest centre is the cheapest.
        owner = jnp.argmin(jnp.sum((x[:, None] - m[None]) ** 2, axis=2), axis=1).astype(jnp.int32)
        return owner, outlier_vectors(x - m[owner], weight)

    def one(m: jax.Array, _) -> tuple[jax.Array, None]:
        owner, o = nearest(m)
        here = class_count(owner, number) > 0
        return jnp.where(here[:, None], class_mean(x + o, owner, number), m), None

    m, _ = jax.lax.scan(one, centers.astype(x.dtype), None, length=num_steps)
    return m, *nearest(m)


class RobustClusteringState(NamedTuple):
    """What the next step needs."""

    centers: RunningMean  # [C, ...], of the features after their outlier vectors
    radius: jax.Array  # [], running quantile of ‖r‖; 0 until there is one


@method(
    target="feature", direction=(-1,), inference="regularised", granularity="sample",
    cite="Forero et al., IEEE TSP 2012", off=dict(weight=float("inf")), alias="rc",
)  # fmt: skip
def robust_clustering(
    *, weight: ArrayLike | None = None, quantile: ArrayLike = 0.9, decay: ArrayLike = 0.9, site: str = "features"
) -> Perturbation:
    """RC for classifiers (our reading): features further than λ/2 from the centre of their class are pulled to that distance.

    o is a constant for the gradient. Centres move after use; a class has none in the first batch that holds it.

    Args:
      weight: λ; None: twice the running quantile of the features' distances from their centres.
      quantile: which one: 0.9 pulls about a tenth of the samples.
      decay: of the running means and of the running quantile.
      site: where the features are.

    Metrics: pulled, the share of the batch.
    """
    check_number("robust_clustering", low=0, infinite=True, weight=weight)
    check_number("robust_clustering", low=0, high=1, quantile=quantile, decay=decay)

    def init(context: Context) -> RobustClusteringState:
        return RobustClusteringState(
            running_mean_init(context.num_classes, tuple(context.site_shapes[context.site][1:]), dtype=context.dtype),
            jnp.zeros([], context.dtype),
        )

    def apply(flow: Flow, rest: Rest, state: RobustClusteringState, context: Context):
        a = wide(jax.lax.stop_gradient(flow.value))
        known = state.centers.seen.at[flow.labels].get(mode="fill", fill_value=False, wrap_negative_indices=False)
        r = jnp.where(per_group(known, a), a - state.centers.mean.astype(a.dtype).at[flow.labels].get(mode="clip"), 0)
        o = outlier_vectors(r, jnp.where(state.radius > 0, 2 * state.radius, jnp.inf) if weight is None else weight)
        centers = running_mean_update(state.centers, a + o, flow.labels, decay=decay, axis_name=context.axis_name)
        metrics = {"pulled": jnp.mean((group_norm(o) > 0).astype(jnp.float32))}
        state = RobustClusteringState(centers, moved_radius(state.radius, group_norm(r), known, context))
        return flow._replace(value=flow.value + o.astype(flow.value.dtype)), state, metrics

    def moved_radius(radius: jax.Array, length: jax.Array, known: jax.Array, context: Context) -> jax.Array:
        length, known = gather(length, context.axis_name), gather(known, context.axis_name)
        found = jnp.nanquantile(jnp.where(known, length, jnp.nan).astype(radius.dtype), jnp.asarray(quantile, radius.dtype))
        share = jnp.asarray(decay, radius.dtype)
        moved = jnp.where(radius > 0, share * radius + (1 - share) * found, found)
        return jnp.where(known.any(), moved, radius)

    return Perturbation(site, init, apply)
