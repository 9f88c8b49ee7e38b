r"""The identity whose backward pass adds a constant: what LPG does to the logits, for any training loop.

    forward: u ↦ u,    backward: ∂ℓ/∂u ↦ ∂ℓ/∂u + δ

Source: LPG, section 3.7 (a hook on the gradient of the logits).
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def _perturbed(u, delta):
    return u


_perturbed.defvjp(lambda u, delta: (u, delta), lambda delta, cotangent: (cotangent + delta, jnp.zeros_like(delta)))


def perturb_cotangent(u: jax.Array, delta: jax.Array) -> jax.Array:
    """u itself, bit for bit; in the backward pass its cotangent gets `delta` added. No gradient flows into delta.

    Under a mean loss over B samples the cotangent of u is h/B, and delta has to be divided by B likewise:

        u = model(params, x)
        h = jax.lax.stop_gradient(jax.nn.softmax(u) - jax.nn.one_hot(y, C))
        u = pj.perturb_cotangent(u, pj.lpg_delta(h, y, direction=signs, bound=0.1) / len(y))
        loss = optax.softmax_cross_entropy_with_integer_labels(u, y).mean()

    Args:
      u: any array of floats. delta: of the same shape.

    >>> print(jax.grad(lambda u: (2 * perturb_cotangent(u, jnp.array([0.5, 0.0]))).sum())(jnp.zeros(2)))
    [2.5 2. ]
    """
    if delta.shape != u.shape:
        raise ValueError(
            f"perturb_cotangent needs delta of u's shape {u.shape}, got {delta.shape}. "
            "Write jnp.broadcast_to(delta, u.shape) for one delta for all samples."
        )
    return _perturbed(u, delta.astype(u.dtype))
