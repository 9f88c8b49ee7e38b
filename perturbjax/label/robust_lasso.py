r"""Robust LASSO (RLASSO): squared loss against targets that may move anywhere, and pay λ per unit for it.

    Σ_c min_{e_c} (u_c − y_c − e_c)² + λ|e_c|,    exact: e = sign(r)·max(0, |r| − λ/2) with r = u − y

which is Huber's loss of the residuals: r² up to |r| = λ/2, λ|r| − λ²/4 beyond. The original is a sparse linear regression; as the loss
of a network it is our reading (without its ‖β‖₁, which weight decay stands for). Its targets leave the simplex: eq. 7 does not apply.
Source: Nguyen & Tran, "Robust Lasso with Missing and Grossly Corrupted Observations", IEEE Trans. Inf. Theory 2013.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.inference.proximal import soft_threshold
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def corruption(outputs: jax.Array, targets: jax.Array, *, weight: ArrayLike) -> jax.Array:
    """e: [B, C], how far each target moves towards the output; a constant for the gradient.

    >>> print(corruption(jnp.array([[0.25, 2.0]]), jnp.array([[1.0, 0.0]]), weight=1.0))
    [[-0.25  1.5 ]]
    """
    outputs = jax.lax.stop_gradient(outputs)
    return soft_threshold(outputs - targets.astype(outputs.dtype), jnp.asarray(weight, outputs.dtype) / 2)


def robust_losses(outputs: jax.Array, targets: jax.Array, *, weight: ArrayLike) -> jax.Array:
    """Σ_c min_e (u_c − y_c − e)² + λ|e|: [B], from outputs and targets [B, C]; whose the move e is does not change it."""
    moved = corruption(outputs, targets, weight=weight)
    paid = jnp.asarray(weight, outputs.dtype) * jnp.abs(moved)
    return jnp.sum((outputs - targets.astype(outputs.dtype) - moved) ** 2 + paid, axis=-1)


def outputs_of(flow: Flow, space: Literal["logit", "probability"]) -> jax.Array:
    """What is compared with the targets: [B, C]."""
    return flow.trace["logits"] if space == "logit" else jnp.exp(flow.trace["prediction"])


@method(
    target="label", direction=(-1,), inference="regularised", granularity="sample",
    cite="Nguyen & Tran, IEEE TIT 2013", off=None, alias="rlasso",
)  # fmt: skip
def robust_lasso(*, weight: ArrayLike = 0.5, space: Literal["logit", "probability"] = "probability") -> Perturbation:
    """Robust LASSO: Huber's loss of logits (or probabilities) against the targets, for wrong labels.

    Replaces the cross entropy, so it comes before the other links of the loss. With probabilities it trains like cross
    entropy; with logits most nets stay where they begin: each entry's target is mostly 0, which is also the median.

    Args:
      weight: λ > 0; residuals count squared up to λ/2 (everywhere, in `space` "probability", for λ ≥ 2).
      space: compare probabilities or logits with the targets.
    """
    check_number("robust_lasso", low=0, open_low=True, weight=weight)
    check_choice("robust_lasso", "space", space, ("logit", "probability"))

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        losses = robust_losses(outputs_of(flow, space), flow.targets, weight=weight)
        return flow._replace(value=losses), state, {}

    return Perturbation("loss", lambda context: (), apply)
