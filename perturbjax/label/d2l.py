r"""D2L: watches the dimensionality of the features; once it grows, the net begins to learn wrong labels, and its own take over.

    LID(a_i) = −(1/k Σ_{j ≤ k} log(r_j/r_k))⁻¹          r_j the distance of a_i to its j-th neighbour in the batch, LID_e its mean over epoch e
    turning point: after `warm_up_epochs` + `window` epochs, LID_e > mean + 2 std of the `window` epochs before
    from then on:  α_e y + (1 − α_e) onehot(argmax p),   α_e = exp(−(e/E) · LID_e/min_{e' ≤ e} LID_e')

The mean is over all training batches of the epoch, whose features are at hand; the authors run ten more batches of 128 after it. At the
turning point they may also go back to the weights of the epoch before. That is not built: a link of the loss changes no weights, and the
net goes on from the epoch in which its features grew.
Source: Ma et al., "Dimensionality-Driven Learning with Noisy Labels", ICML 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, gather, own_share, wide
from perturbjax.label.bootstrapping import bootstrapped_targets
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def local_dimension(features: jax.Array, *, num_neighbours: int = 20, axis_name: AxisName = None) -> jax.Array:
    """LID: [B], the maximum-likelihood estimate of each sample's local intrinsic dimension among the batch's others.

    Args:
      features: [B, d], any float type (computed in at least float32); a constant for the gradient.
      num_neighbours: k, at most B − 1.
      axis_name: mapped axis: neighbours are looked for on all devices.
    """
    own = wide(jax.lax.stop_gradient(features)).reshape(features.shape[0], -1)
    every = gather(own, axis_name)
    square = lambda a: jnp.sum(a * a, axis=-1)
    product = jnp.matmul(own, every.T, precision=jax.lax.Precision.HIGHEST)
    tiny = jnp.finfo(own.dtype).eps * jnp.maximum(square(every).max(), jnp.finfo(own.dtype).tiny)
    distance = jnp.maximum(square(own)[:, None] + square(every)[None] - 2 * product, tiny)  # squared
    self = own_share(jnp.eye(every.shape[0], dtype=bool), axis_name)
    k = min(num_neighbours, every.shape[0] - 1)
    nearest = -jax.lax.top_k(jnp.where(self, -jnp.inf, -distance), k)[0]
    mean = jnp.mean(jnp.log(nearest / nearest[:, -1:]), axis=-1) / 2
    return jnp.where(mean < 0, -1 / jnp.where(mean < 0, mean, 1), 0)  # all neighbours as far: no estimate


class D2LState(NamedTuple):
    """Everything is of the epochs that are over, but total, count and epoch."""

    total: jax.Array  # [], LID summed over the present epoch's batches
    count: jax.Array  # [], of these batches
    epoch: jax.Array  # [] int32, the present epoch
    recent: jax.Array  # [window], LID of the last epochs, the newest last
    finished: jax.Array  # [] int32, epochs that are over
    lowest: jax.Array  # [], the smallest LID of an epoch
    turned: jax.Array  # [] bool, whether the turning point has been
    alpha: jax.Array  # [], the label's share


def turning(state: D2LState, lid: jax.Array, progress: ArrayLike, *, warm_up_epochs: int, tolerance: ArrayLike) -> D2LState:
    """The state after an epoch whose mean LID is `lid`; total, count and epoch are left."""
    mean, std = jnp.mean(state.recent), jnp.std(state.recent)
    grown = lid > mean + jnp.asarray(tolerance, std.dtype) * std
    turned = state.turned | (grown & (state.finished >= warm_up_epochs + state.recent.shape[0]))
    lowest = jnp.where(state.finished == 0, lid, jnp.minimum(state.lowest, lid))
    alpha = jnp.exp(-jnp.asarray(progress, lid.dtype) * lid / jnp.maximum(lowest, 1e-6))
    return state._replace(
        recent=jnp.concatenate([state.recent[1:], lid[None]]), finished=state.finished + 1, lowest=lowest, turned=turned,
        alpha=jnp.where(turned, alpha, 1),
    )  # fmt: skip


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Ma et al., ICML 2018", off=None,
)  # fmt: skip
def d2l(
    *, num_neighbours: int = 20, warm_up_epochs: int = 5, window: int = 5, tolerance: ArrayLike = 2.0, site: str = "features"
) -> Perturbation:
    """D2L: replaces labels by the net's own predictions once the local dimension of its features begins to grow.

    Args:
      num_neighbours: k of the estimate (a batch has at least k + 1 samples, or all its others count).
      warm_up_epochs, window: the turning point may come once both are over; `window` epochs are looked back at.
      tolerance: standard deviations above their mean that are a turning point; inf: never, which is plain training.
      site: whose values are looked at.

    Metrics: lid, the batch's mean; label_share, α.
    """
    check_number("d2l", low=1, num_neighbours=num_neighbours, window=window)
    check_number("d2l", low=0, warm_up_epochs=warm_up_epochs)
    check_number("d2l", low=0, infinite=True, tolerance=tolerance)

    def init(context: Context) -> D2LState:
        zero = jnp.zeros([], context.dtype)
        recent = jnp.zeros([window], context.dtype)
        return D2LState(zero, zero, jnp.int32(0), recent, jnp.int32(0), zero, jnp.bool_(False), jnp.ones_like(zero))

    def apply(flow: Flow, rest: Rest, state: D2LState, context: Context):
        lid = jnp.mean(local_dimension(flow.trace[site], num_neighbours=num_neighbours, axis_name=context.axis_name))
        lid = (lid if context.axis_name is None else jax.lax.pmean(lid, context.axis_name)).astype(state.total.dtype)
        epoch = jnp.asarray(context.epoch, jnp.int32)
        new = epoch != state.epoch
        # At the first step of epoch e, progress is e/E.
        mean = state.total / jnp.maximum(state.count, 1)
        over = turning(state, mean, context.progress, warm_up_epochs=warm_up_epochs, tolerance=tolerance)
        state = jax.tree.map(lambda a, b: jnp.where(new & (state.count > 0), a, b), over, state)
        kept = lambda x: jnp.where(new, 0, x)
        state = state._replace(total=kept(state.total) + lid, count=kept(state.count) + 1, epoch=epoch)
        targets = bootstrapped_targets(flow.value, flow.trace["prediction"], weight=1 - state.alpha, kind="hard")
        return flow._replace(value=targets), state, {"lid": lid, "label_share": state.alpha}

    return Perturbation("label", init, apply, needs=(site,))
