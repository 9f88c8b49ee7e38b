"""What the links that look at the gradient elsewhere (SAM, PUGD) share: norms over all parameters, the step up, the call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from perturbjax.classes import wide


def unit_tree(tree: Any) -> Any:
    """tree/‖tree‖ with one l2 norm over all leaves, in at least float32; a zero tree stays zero instead of becoming nan."""
    wider = jax.tree.map(wide, tree)
    norm = optax.tree.norm(wider)
    return jax.tree.map(lambda x, w: (w / jnp.where(norm > 0, norm, 1)).astype(x.dtype), tree, wider)


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
            "batch)). Under optax.chain the extra argument reaches every link."
        )


def at_step(setting: Any, count: jax.Array) -> Any:
    """A number, or a schedule's value at this step."""
    return setting(count) if callable(setting) else setting
