"""What the links that look at the gradient elsewhere (the SAM family, PUGD, RTS) share: norms over all parameters, the step up.

Three things hold for all of them. BatchNorm's running statistics come from the first pass, the unperturbed one: `grad_fn` writes none,
so official codes that write them in both passes or in none can't be reproduced in this respect. A zero gradient stays zero,
while nan and infinite ones become nan as a whole, for the trainer to see. And gradients are what `jax.grad` gives: by complex
parameters ∂f/∂x − i ∂f/∂y, whose conjugate is the way up. The updates are gradients of this kind, too: conjugate them at the end of the
chain, as for any other optax optimiser. (`perturbjax.parameter.asking` has what they share in the call.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.classes import AxisName, wide


class AscentState(NamedTuple):
    """State of the links that remember nothing but how often they were called."""

    count: jax.Array  # [] int32, steps taken, for schedules where the update gets no `step`
    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far

    @classmethod
    def start(cls) -> "AscentState":
        """Before the first step."""
        return cls(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def after_step(self, gradients: int = 1) -> "AscentState":
        """After one more step, which asked for so many gradients."""
        return AscentState(optax.safe_increment(self.count), self.evaluations + gradients)


def widen(tree: Any) -> Any:
    """All leaves in at least float32."""
    return jax.tree.map(wide, tree)


def dot(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ over all leaves, in at least float32; its real part for complex ones."""
    pairs = zip(jax.tree.leaves(widen(a)), jax.tree.leaves(widen(b)), strict=True)
    return jnp.asarray(sum(jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in pairs))


def upward(grads: Any) -> Any:
    """The direction in which the loss rises, in at least float32: conj(g), which is g for real parameters."""
    return optax.tree.conj(widen(grads))


def safe(norm: jax.Array, epsilon: ArrayLike = 0.0) -> jax.Array:
    """What to divide by: norm + epsilon, but 1 for 0, and nan for an infinite norm, which would turn finite numbers into zeros."""
    norm = norm + jnp.asarray(epsilon, norm.dtype)
    return jnp.where(norm == 0, 1, jnp.where(jnp.isfinite(norm), norm, jnp.nan))


def unit_tree(tree: Any, epsilon: ArrayLike = 0.0) -> Any:
    """tree/(‖tree‖ + epsilon) with one l2 norm over all leaves, in at least float32; a zero tree stays zero."""
    norm = jnp.sqrt(dot(tree, tree))
    return jax.tree.map(lambda x: (wide(x) / safe(norm, epsilon).astype(wide(x).dtype)).astype(x.dtype), tree)


def weighted(params: Any, grads: Any) -> Any:
    """|w| ⊙ g, leaf by leaf, in the gradients' types."""
    return jax.tree.map(lambda w, g: jnp.abs(w).astype(g.dtype) * g, params, grads)


def move(params: Any, direction: Any, radius: Any = 1.0) -> Any:
    """params + radius · direction, leaf by leaf; the sum is taken in at least float32 and rounded to the parameters' types."""

    def moved(w, e):
        to = wide(w)
        return (to + jnp.asarray(radius, to.dtype) * e.astype(to.dtype)).astype(w.dtype)

    return jax.tree.map(moved, params, direction)


def require(name: str, params: Any, grad_fn: Callable | None) -> None:
    """Raises ValueError, naming the call that works, unless the update got both."""
    missing = "params" if params is None else "grad_fn" if grad_fn is None else None
    if missing:
        raise ValueError(
            f"{name} needs `{missing}`, got none: call tx.update(grads, state, params, grad_fn=lambda p: jax.grad(loss)(p, "
            "batch)). Under optax.chain the extra argument reaches every link; Flax's TrainState.apply_gradients passes none on: call "
            "state.tx.update(...) in its place (docs/optimizer_links.md has the lines)."
        )


def to_climb(name: str, grads: Any, local_grads: Any, sync_perturbation: bool, axis_name: AxisName = None) -> Any:
    """The gradient to climb along: the whole batch's, or this device's own (m-sharpness).

    Under one jit over several devices a device has no gradient of its own: then `local_grads` is not given, which is an error.
    axis_name: of the devices in per-device code; one whose own gradient has no finite norm makes all devices' nan.
    """
    if sync_perturbation:
        return grads
    if local_grads is None:
        raise ValueError(
            f"{name} needs `local_grads` (each device's own gradient) for sync_perturbation=False, got none: one jit over several "
            "devices has the whole batch's gradient only. Write --parallel pmap, or sync_perturbation=true."
        )
    if axis_name is None:
        return local_grads
    fine = jax.lax.pmin(jnp.isfinite(dot(local_grads, local_grads)).astype(jnp.int32), axis_name) > 0
    return jax.tree.map(lambda g: jnp.where(fine, g, jnp.nan), local_grads)


def with_decay(grads: Any, params: Any, decay: ArrayLike) -> Any:
    """The gradient of loss + decay/2 · ‖params‖², in the gradients' types: g + decay · conj(w)."""
    if isinstance(decay, (int, float)) and decay == 0:
        return grads
    decayed = lambda g, w: wide(g) + jnp.asarray(decay, wide(g).dtype) * jnp.conj(w).astype(wide(g).dtype)
    return jax.tree.map(lambda g, w: decayed(g, w).astype(g.dtype), grads, params)
