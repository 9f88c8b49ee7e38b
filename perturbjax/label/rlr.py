r"""Robust label regression (RLR): squared loss against targets that may move away from the boundary as far as the output has gone.

    min_{M ≥ 0} ‖u − (y + E ⊙ M)‖²,   E = +1 at the label, −1 elsewhere;   exact: M = max(0, E ⊙ (u − y))

so that only entries on the wrong side of their target pay: max(0, 1 − u_y)² + Σ_{j≠y} max(0, u_j)². With `compactness` γ the graph
term γ · Σ_{y_i = y_j} ‖u_i − u_j‖²/n_c = 2γ Σ_i ‖u_i − ū_{y_i}‖² is added (class means of the batch). The original is a linear
regression; as the loss of a network it is our reading. Its targets leave the simplex, so eq. 7 does not apply.
Source: Fang et al., "Regularized Label Relaxation Linear Regression", IEEE TNNLS 2018.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import class_mean
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def relaxed_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """y + E ⊙ M: [B, C], from u and y [B, C]; E from the largest entry of y. A constant for the gradient.

    >>> print(relaxed_targets(jnp.array([[1.5, 0.2], [0.4, -2.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])))
    [[ 1.5  0. ]
     [ 1.  -2. ]]
    """
    u = jax.lax.stop_gradient(logits)
    sign = 2 * jax.nn.one_hot(jnp.argmax(targets, axis=-1), u.shape[-1], dtype=u.dtype) - 1
    targets = targets.astype(u.dtype)
    return targets + sign * jnp.maximum(sign * (u - targets), 0)


@method(
    target="label", direction=(-1,), inference="regularised", granularity="sample",
    cite="Fang et al., IEEE TNNLS 2018", off=None,
)  # fmt: skip
def rlr(*, compactness: ArrayLike = 0.0, weight: ArrayLike = 0.25) -> Perturbation:
    """Robust label regression: squared loss of the logits, for entries on the wrong side of their target only.

    Replaces the cross entropy, so it comes before the other links of the loss.

    Args:
      compactness: γ, weight of the squared distance of logits to their class's mean in the batch.
      weight: factor of all of it; 1 as in the equation. The second derivative of the squared loss is 2, that of cross entropy at most ½: a
        quarter of it trains at cross entropy's learning rates, all of it wants a lower one.
    """
    check_number("rlr", low=0, compactness=compactness, weight=weight)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        u = flow.trace["logits"]
        losses = jnp.sum((u - relaxed_targets(u, flow.targets)) ** 2, axis=-1)
        # The mean is where the sum of squares is smallest: held constant, the gradient is the same.
        mean = class_mean(jax.lax.stop_gradient(u), flow.labels, context.num_classes, axis_name=context.axis_name)
        spread = jnp.sum((u - mean[flow.labels].astype(u.dtype)) ** 2, axis=-1)
        losses = losses + 2 * jnp.asarray(compactness, u.dtype) * spread
        return flow._replace(value=jnp.asarray(weight, u.dtype) * losses), state, {}

    return Perturbation("loss", lambda context: (), apply)
