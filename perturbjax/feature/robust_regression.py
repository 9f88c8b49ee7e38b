r"""Robust regression (RR): squared loss of outputs that may be shifted anywhere, and pay λ per unit for it.

    Σ_c min_{f_c} (u_c + f_c − y_c)² + λ|f_c|,    exact: f = −sign(r)·max(0, |r| − λ/2) with r = u − y

The original is a linear regression whose responses are partly shuffled or wrong: ‖y − Xβ − √n f‖²/n + λ‖f‖₁, a sparse shift √n f of what
the features predict, Xβ. Here u are a network's logits, its last layer's Xβ (our reading). The loss is Huber's of the residuals, the
same as that of RLASSO, which moves the targets instead.
Source: Slawski & Ben-David, "Linear Regression with Sparsely Permuted Data", Electronic Journal of Statistics 2019; taxonomy Table 1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.label.robust_lasso import corruption, outputs_of, robust_losses
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def sparse_shift(outputs: jax.Array, targets: jax.Array, *, weight: ArrayLike) -> jax.Array:
    """f: [B, C], how far each output moves towards its target; a constant for the gradient.

    >>> print(sparse_shift(jnp.array([[0.25, 2.0]]), jnp.array([[1.0, 0.0]]), weight=1.0))
    [[ 0.25 -1.5 ]]
    """
    return -corruption(outputs, targets, weight=weight)


@method(
    target="feature", direction=(-1,), inference="regularised", granularity="sample",
    cite="Slawski & Ben-David, EJS 2019", off=None, alias="rr",
)  # fmt: skip
def robust_regression(*, weight: ArrayLike = 0.5, space: Literal["logit", "probability"] = "probability") -> Perturbation:
    """Robust regression: Huber's loss of the logits (or probabilities), for samples whose label does not belong to them.

    Replaces the cross entropy, so it comes before the other links of the loss. With probabilities it trains like cross entropy; with
    logits, the original's own outputs, most nets stay at the median of the targets, which is 0.

    Args:
      weight: λ > 0; residuals count squared up to λ/2 (everywhere, in `space` "probability", for λ ≥ 2).
      space: shift probabilities or logits.

    Metrics: shifted, the share of the outputs that are.
    """
    check_number("robust_regression", low=0, open_low=True, weight=weight)
    check_choice("robust_regression", "space", space, ("logit", "probability"))

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        outputs = outputs_of(flow, space)
        moved = sparse_shift(outputs, flow.targets, weight=weight) != 0
        losses = robust_losses(outputs, flow.targets, weight=weight)
        return flow._replace(value=losses), state, {"shifted": jnp.mean(moved.astype(jnp.float32))}

    return Perturbation("loss", lambda context: (), apply)
