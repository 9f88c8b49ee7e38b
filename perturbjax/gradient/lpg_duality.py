r"""LPL in the backward pass: the shift of the logit gradient that a small shift of the logits amounts to.

    h(u + δ) − h(u) = (diag(p) − p pᵀ) δ + O(‖δ‖²),    h = ∂ℓ/∂u = p − y        (Proposition 1, eqs. 22–23)

The matrix is the Hessian of the cross entropy; its range is the plane of vectors that sum to zero. LPG's closed form stays in it
(h̄ sums to zero): δ = logit_gradient_of(δ/p, p), a shift that LPL could make, sample by sample. "Strictly more expressive" (section
3.8.1) is true of LPG-PGD alone, whose sign steps, or whose full Jacobian, leave the plane along the all-ones direction.
Source: LPG, Proposition 1.
"""

import jax
import jax.numpy as jnp

from perturbjax.classes import wide


def logit_gradient_of(delta: jax.Array, probabilities: jax.Array) -> jax.Array:
    """(diag(p) − p pᵀ) δ, per sample: [B, C], in at least float32.

    Args:
      delta: δ [B, C], the shift of the logits (of one sample: [C]).
      probabilities: p [B, C], softmax of the logits before the shift, of the same shape.

    >>> print(logit_gradient_of(jnp.array([[1.0, 0.0]]), jnp.array([[0.75, 0.25]])).round(4))
    [[ 0.1875 -0.1875]]
    """
    if delta.shape != probabilities.shape:
        raise ValueError(
            f"logit_gradient_of needs delta and probabilities of one shape, got {delta.shape} and {probabilities.shape}. "
            "For one delta for all samples write jnp.broadcast_to(delta, probabilities.shape)."
        )
    d, p = wide(delta), wide(probabilities)
    return p * (d - jnp.sum(p * d, axis=-1, keepdims=True))
