"""What the links that look at several gradients of one batch (PCGrad, GradDrop, DP-SGD) share: who is in a group, its gradient.

A group's gradient is that of its samples' part of the loss, (1/B) Σ_{i in the group} ℓ_i: over all groups they add up to the gradient
of the whole batch. The penalty of the loss (center loss), which weights don't touch, belongs to no group and is taken out of each.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from perturbjax.classes import AxisName, wide

Groups = Literal["classes", "domains"] | int
"""Whose gradients are compared: classes, domains, or that many groups of classes with neighbouring indices."""


def check_groups(name: str, groups: Groups) -> None:
    """Raises ValueError unless it is "classes", "domains" or a positive whole number."""
    whole = isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1
    if not whole and groups not in ("classes", "domains"):
        raise ValueError(f"{name} needs groups='classes', 'domains' or a number of at least 1, got {groups!r}.")


def group_members(name: str, groups: Groups, extra: dict[str, Any]) -> jax.Array:
    """[G, B] float32, 1 where a sample is in a group, from the extra arguments of an update.

    "classes" and a number k (class c is in group ⌊c·k/C⌋) read `labels` and `num_classes`; "domains" reads `side["domain"]` and
    `num_domains`. A group without a sample in the batch is a row of zeros.
    """

    def given(key: str, how: str) -> Any:
        if extra.get(key) is None:
            raise ValueError(f"{name} needs `{key}`, got none: call tx.update(grads, state, params, grad_fn=grad_fn, {how}).")
        return extra[key]

    if groups == "domains":
        how = 'side={"domain": domains}, num_domains=D, key=key'
        side = extra.get("side")
        if side is not None and "domain" not in side:  # a trainer's, whose data has no domains: its user calls no update
            raise ValueError(
                f"{name} needs side['domain'], got {sorted(side)}. Write groups='classes' for data without domains."
            )
        number, side = given("num_domains", how), given("side", how)
        return jax.nn.one_hot(side["domain"], number, dtype=jnp.float32).T
    labels = given("labels", "labels=labels, num_classes=C, key=key")
    if groups == 1:
        return jnp.ones([1, labels.shape[0]], jnp.float32)
    number = given("num_classes", "labels=labels, num_classes=C, key=key")
    if groups == "classes":
        return jax.nn.one_hot(labels, number, dtype=jnp.float32).T
    if groups > number:
        raise ValueError(f"{name} needs at most {number} groups of {number} classes, got {groups}. Write groups='classes'.")
    return jax.nn.one_hot(labels * groups // number, groups, dtype=jnp.float32).T


def weighted_gradients(
    grad_fn: Callable, params: optax.Params, weights: jax.Array, *, chunk: int | None = None
) -> tuple[Any, Any]:
    """(the gradients [G, ...] of the parts of the loss that the weights [G, B] choose, the gradient of what they don't touch).

    One program: the forward pass is shared, the backward passes are vmapped. chunk: so many of them at a time, for memory; None: all.
    """
    # Row G chooses nothing: what is left is the penalty's.
    rows = jnp.concatenate([weights, jnp.zeros_like(weights[:1])])
    one = lambda row: jax.tree.map(wide, grad_fn(params, weights=row))
    found = jax.vmap(one)(rows) if chunk is None else jax.lax.map(one, rows, batch_size=chunk)
    rest = jax.tree.map(lambda x: x[-1], found)
    return _cleared(jax.tree.map(lambda x, r: x[:-1] - r[None], found, rest), rest, weights), rest


def _cleared(gradients: Any, rest: Any, weights: jax.Array) -> Any:
    """The gradients with zeros for a group without samples, where subtracting the penalty has left rounding: noise has a direction, too.

    Only if it is small beside the penalty: in per-device code a group without samples here may have some on another device.
    """
    square = lambda tree, axes: sum(jnp.sum(x**2, axis=tuple(range(axes, x.ndim))) for x in jax.tree.leaves(tree))
    empty = ~(weights != 0).any(1) & (square(gradients, 1) <= 1e-8 * square(rest, 0))
    return jax.tree.map(lambda g: jnp.where(empty.reshape((-1,) + (1,) * (g.ndim - 1)), 0, g), gradients)


def require_weights(name: str, grad_fn: Callable) -> None:
    """Raises ValueError, naming the line to write, unless grad_fn takes weights."""
    known = inspect.signature(grad_fn).parameters.values()
    if not any(p.name == "weights" or p.kind is p.VAR_KEYWORD for p in known):
        raise ValueError(
            f"{name} needs a grad_fn that takes weights= [B], got one without. Write grad_fn=lambda p, *, weights=None: "
            "jax.grad(lambda p: objective(p, states, batch, weights=weights)[0])(p)."
        )


def require_key(name: str, key: jax.Array | None) -> None:
    """Raises ValueError unless the update got a key."""
    if key is None:
        raise ValueError(
            f"{name} needs `key`, got none: call tx.update(grads, state, params, key=jax.random.key(step), grad_fn=grad_fn, "
            "labels=labels, num_classes=C)."
        )


def example_members(batch_size: int, axis_name: AxisName) -> jax.Array:
    """[N, B]: every sample of the batch as a group of its own; in per-device code N counts the samples of all devices.

    There, each device is given the gradients of all N samples by a grad_fn that averages over devices: the numbers of one device.
    """
    if axis_name is None:
        return jnp.eye(batch_size, dtype=jnp.float32)
    first = jax.lax.axis_index(axis_name) * batch_size
    everyone = jnp.arange(jax.lax.psum(1, axis_name) * batch_size, dtype=jnp.int32)
    return (everyone[:, None] == first + jnp.arange(batch_size, dtype=jnp.int32)[None]).astype(jnp.float32)


def combined(gradients: Any, coefficients: jax.Array) -> Any:
    """Σ_g coefficients[..., g] · gradients[g], leaf by leaf: [G, ...] -> [...], or [G, ...] for coefficients [G, G]."""
    return jax.tree.map(
        lambda g: jnp.tensordot(coefficients.astype(g.dtype), g, axes=1, precision=jax.lax.Precision.HIGHEST), gradients
    )


def added(updates: Any, change: Any) -> Any:
    """updates + change, in at least float32, with the types of the updates."""
    return jax.tree.map(lambda u, d: (wide(u) + d.astype(wide(u).dtype)).astype(u.dtype), updates, change)
