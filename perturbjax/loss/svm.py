r"""Support vector machine: the multi-class hinge loss, perturbed by one slack variable per sample.

    ℓ = max(0, 1 − m),   m = u_y − max_{j≠y} u_j;    min_{ξ≥0} max(0, ℓ − ξ) + λ ξ = min(1, λ) · ℓ,   at ξ = ℓ if λ < 1, else 0

So the slack only scales the hinge (eqs. 18 and 19 of the taxonomy agree for λ ≤ 1). With `decay`, γ ½‖W‖² of the head is added:
eq. 18 is γ = 1/N; the optimiser's weight decay is such a term already. For hard labels ℓ is `optax.losses.multiclass_hinge_loss`;
mixed targets take Σ_c ŷ_c ℓ_c. Source: Cortes & Vapnik, Machine Learning 1995; Crammer & Singer, JMLR 2001 (several classes); taxonomy eqs. 16–19.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_classes, check_number
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def margins(logits: jax.Array) -> jax.Array:
    """m for each class in the part of y: u_c − max_{j≠c} u_j, [B, C] from logits [B, C]; positive for the predicted class only.

    >>> print(margins(jnp.array([[3.0, 1.0, -1.0]])))
    [[ 2. -2. -4.]]
    """
    check_classes("margins", logits.shape[-1])
    top, place = jax.lax.top_k(logits, 2)
    is_first = jnp.arange(logits.shape[-1], dtype=place.dtype)[None] == place[:, :1]
    others = jnp.where(is_first, top[:, 1:], top[:, :1])
    return logits - others


def slack(losses: jax.Array, *, weight: ArrayLike = 1.0) -> tuple[jax.Array, jax.Array]:
    """(ξ, the perturbed losses max(0, ℓ − ξ) + λξ) at the minimum over ξ ≥ 0, for losses ℓ ≥ 0 and λ = `weight`.

    >>> print(*slack(jnp.array([0.0, 2.0]), weight=0.25))
    [0. 2.] [0.  0.5]
    """
    weight = jnp.asarray(weight, losses.dtype)
    return jax.lax.stop_gradient(jnp.where(weight < 1, losses, 0)), jnp.minimum(weight, 1) * losses


@method(
    target="loss", direction=(-1,), inference="regularised", granularity="sample",
    cite="Cortes & Vapnik, Machine Learning 1995", off=None,
)  # fmt: skip
def svm(*, weight: ArrayLike = 1.0, decay: ArrayLike | None = None) -> Perturbation:
    """Multi-class SVM: the hinge loss with slack variables at price `weight` instead of cross entropy.

    Replaces the loss so far, so it comes before the other links of the loss.

    Args:
      weight: λ > 0; from 1 on there is no slack, below it every hinge counts λ times.
      decay: γ of γ ½‖W‖², for the last layer's weights; eq. 18 is 1/N, svm(decay=0.001) for 1,000 training samples. None: none beside
        the optimiser's, which is such a term for all layers (the usual 5e-4 is 1/N for N = 2,000).
    """
    check_number("svm", low=0, open_low=True, infinite=True, weight=weight)
    check_number("svm", low=0, decay=decay)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        hinges = jnp.maximum(0, 1 - margins(flow.trace["logits"]))
        losses = slack(jnp.sum(flow.targets.astype(hinges.dtype) * hinges, axis=-1), weight=weight)[1]
        flow = flow._replace(value=losses)
        if decay is not None:
            rows = wide(context.head()[0])
            half = jnp.asarray(decay, rows.dtype) * 0.5 * jnp.sum(rows**2)
            flow = flow._replace(penalty=flow.penalty + half.astype(flow.penalty.dtype))
        return flow, state, {}

    return Perturbation("loss", lambda context: (), apply, needs=() if decay is None else ("head",))
