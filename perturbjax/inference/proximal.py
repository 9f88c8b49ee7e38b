r"""Regularised inference: a delta that pays for its size, found by proximal gradient steps.

    v ← prox_{κλ·Reg}( v − κ · ∂f(v)/∂v )

    l1   Reg(v) = ‖v‖₁     prox = sign(v)·max(0, |v| − κλ)        sparse entries
    l2   Reg(v) = ‖v‖²₂    prox = v/(1 + 2κλ)                     small everywhere

Unlike a gradient step on |v|, the l1 one keeps exact zeros. It never overshoots for κ ≤ 1/L; cross entropy as a function of the logits
has L = 1/2. Source: Parikh & Boyd, "Proximal Algorithms", 2014, sections 4.2 and 6.5; taxonomy eq. 27.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice

Regulariser = Literal["l1", "l2"]
REGULARISERS = ("l1", "l2")
CROSS_ENTROPY_STEP = 2.0
"""1/L of cross entropy as a function of the logits: the Hessian diag(p) − ppᵀ has no eigenvalue above 1/2."""


def soft_threshold(x: jax.Array, amount: ArrayLike) -> jax.Array:
    """argmin_z ½(z − x)² + amount·|z| for every entry: x, shrunk towards zero by `amount`.

    >>> print(soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0))
    [-2.  0.  1.]
    """
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - jnp.asarray(amount, x.dtype), 0)


def proximal_step(
    delta: jax.Array, slope: jax.Array, *, weight: ArrayLike, step_size: ArrayLike, norm: Regulariser = "l1"
) -> jax.Array:
    """The delta after one step down a slope ∂f/∂δ, both [...], with λ = `weight` and κ = `step_size`."""
    check_choice("proximal_step", "norm", norm, REGULARISERS)
    weight, step_size = jnp.asarray(weight, delta.dtype), jnp.asarray(step_size, delta.dtype)
    moved = delta - step_size * slope
    return soft_threshold(moved, step_size * weight) if norm == "l1" else moved / (1 + 2 * step_size * weight)


def proximal_search(
    slope_of: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    *,
    weight: ArrayLike,
    step_size: ArrayLike = CROSS_ENTROPY_STEP,
    norm: Regulariser = "l1",
    tolerance: float | None = None,
    max_steps: int = 2000,
) -> jax.Array:
    """The minimiser of f(δ) + λ·Reg(δ): steps until no entry moves by more than `tolerance`; no derivative.

    Args:
      slope_of: δ -> ∂f/∂δ, for a convex f.
      start: δ at the beginning, [...].
      weight: λ. step_size: κ, at most 1/L to converge.
      tolerance: relative to the largest entry, if that is above 1. None: 1e-6, and 1e-13 in float64.
      max_steps: the search ends here at the latest.
    """
    if tolerance is None:
        tolerance = 1e-13 if start.dtype == jnp.float64 else 1e-6
    weight, step_size = jax.lax.stop_gradient((jnp.asarray(weight, start.dtype), jnp.asarray(step_size, start.dtype)))

    def more(carry):
        _, moved, k = carry
        return (moved > tolerance) & (k < max_steps)

    def body(carry):
        delta, _, k = carry
        after = proximal_step(delta, slope_of(delta), weight=weight, step_size=step_size, norm=norm)
        return after, jnp.max(jnp.abs(after - delta)) / jnp.maximum(jnp.max(jnp.abs(after)), 1), k + 1

    moved = jnp.asarray(jnp.inf, start.dtype)
    return jax.lax.while_loop(more, body, (jax.lax.stop_gradient(start), moved, jnp.int32(0)))[0]
