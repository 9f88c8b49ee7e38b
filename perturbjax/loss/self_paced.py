r"""Self-paced learning: the easy samples first; those whose loss is above a growing threshold have to wait.

    kind="hard"      min(ℓ, λ_t):                    weights w = [ℓ ≤ λ_t]                (taxonomy eqs. 63–64)
    kind="linear"    ℓ − ℓ²/(2λ_t), at most λ_t/2:   weights w = max(0, 1 − ℓ/λ_t)

The loss is min_w wℓ + r(w), so that its gradient is w·∇ℓ; as a perturbation, Δℓ = min(0, λ_t − ℓ). λ_t is a quantile of the
batch's losses that rises to 1, or given. Source: Kumar, Packer, Koller, "Self-paced learning for latent variable models", NeurIPS
2010; the linear form: Jiang et al., ACM MM 2014.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.classes import AxisName, gather, number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.parameter.timing import Course, Place, at, check_setting, not_negative
from perturbjax.rounding import rounded_up


def self_paced_losses(losses: jax.Array, threshold: ArrayLike, *, kind: Literal["hard", "linear"] = "hard") -> jax.Array:
    """The perturbed losses, for losses ℓ ≥ 0 [B] and λ_t; no gradient flows through the threshold.

    >>> print(self_paced_losses(jnp.array([1.0, 4.0]), 2.0))
    [1. 2.]
    """
    check_choice("self_paced_losses", "kind", kind, ("hard", "linear"))
    limit = jax.lax.stop_gradient(jnp.asarray(threshold, losses.dtype))
    if kind == "hard":
        return jnp.where(losses <= limit, losses, limit)
    safe = jnp.where(limit > 0, limit, 1)
    return jnp.where(losses < limit, losses - losses**2 / (2 * safe), limit / 2)


def loss_quantile(losses: jax.Array, level: ArrayLike, *, axis_name: AxisName = None) -> jax.Array:
    """The loss that a share `level` of the batch (of all devices' batches) does not exceed: the ⌈level · B⌉-th smallest."""
    losses = gather(losses, axis_name)
    place = rounded_up(number(level) * losses.shape[0]).astype(jnp.int32)
    return jnp.sort(losses)[jnp.clip(place, 1, losses.shape[0]) - 1]


@method(
    target="loss", direction=(-1,), inference="regularised", granularity="sample",
    cite="Kumar et al., NeurIPS 2010", off=dict(start=1.0), alias="spl",
)  # fmt: skip
def self_paced(
    *,
    start: ArrayLike = 0.5,
    ramp: ArrayLike = 0.5,
    kind: Literal["hard", "linear"] = "hard",
    tau: ArrayLike | Course | Callable[[ArrayLike], ArrayLike] | None = None,
) -> Perturbation:
    """Self-paced learning: starts with the samples of small loss and lets in the harder ones as training goes on.

    Args:
      start: share of each batch that counts at the beginning. ramp: share of training after which all of it does.
      kind: "hard" (in or out) or "linear" (smaller losses weigh more).
      tau: λ_t itself, a number, a schedule of the step, `linear(...)` or `cosine(...)`, instead of a share of the batch. A schedule that
        turns negative gives nan.

    Metrics: kept, the share of samples below the threshold.
    """
    check_number("self_paced", low=0, high=1, open_low=True, start=start)
    check_number("self_paced", low=0, high=1, ramp=ramp)
    check_choice("self_paced", "kind", kind, ("hard", "linear"))
    if isinstance(tau, Course) or callable(tau):
        check_setting("self_paced", rate=False, tau=tau)
    else:
        check_number("self_paced", low=0, open_low=True, infinite=True, tau=tau)

    def threshold(losses: jax.Array, context: Context) -> jax.Array:
        if tau is not None:
            step, progress = context.step if callable(tau) else None, context.progress if isinstance(tau, Course) else None
            place = Place(step, progress, value=None, rate=None)
            return not_negative(at(tau, place)).astype(losses.dtype)
        if not is_traced(ramp) and np.all(np.asarray(ramp) <= 0):
            return loss_quantile(losses, 1.0, axis_name=context.axis_name)
        first, share = jnp.asarray(start, context.dtype), jnp.asarray(ramp, context.dtype)
        done = jnp.minimum(jnp.asarray(context.progress, context.dtype) / jnp.where(share > 0, share, 1), 1)
        level = jnp.where(share > 0, first + (1 - first) * done, 1)
        return loss_quantile(losses, level, axis_name=context.axis_name)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        limit = threshold(jax.lax.stop_gradient(flow.value), context)
        kept = jnp.mean((flow.value <= limit).astype(jnp.float32))
        return flow._replace(value=self_paced_losses(flow.value, limit, kind=kind)), state, {"kept": kept}

    return Perturbation("loss", lambda context: (), apply)
