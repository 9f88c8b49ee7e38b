r"""Gradient sign dropout (GradDrop): every coordinate keeps the gradients of one sign only, drawn by how the groups' signs weigh.

    P = ½ (1 + Σ_i g_i / Σ_i |g_i|),    U ~ U(0, 1) per coordinate,    M_i = [P > U][g_i > 0] + [P < U][g_i < 0]
    g̃ = Σ_i (leak + (1 − leak) M_i) g_i

g_i are the gradients of the groups (classes, groups of classes or domains); 0/0 is ½. The expectation over U is Σ_i g_i: the link
adds noise where groups disagree on the sign, and nothing where they agree. (The paper drops the gradients of shared activations;
here it is the parameters', as PCGrad's.)
Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.gradient.groups import (
    Groups,
    added,
    check_groups,
    group_members,
    require_key,
    require_weights,
    weighted_gradients,
)
from perturbjax.method import method
from perturbjax.parameter.asking import Mask, asking


class GradDropState(NamedTuple):
    """State of `graddrop`."""

    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far


def graddrop_mask(gradients: jax.Array, uniform: jax.Array) -> jax.Array:
    """M [G, ...] bool for gradients [G, ...] and U [...]: the sign that each coordinate keeps. Zeros count as kept.

    >>> print(graddrop_mask(jnp.array([[3.0, 1.0], [-1.0, 2.0]]), jnp.array([0.5, 0.9])))
    [[ True  True]
     [False  True]]
    """
    g = wide(gradients)
    size = jnp.abs(g).sum(0)
    share = 0.5 * (1 + jnp.where(size > 0, g.sum(0) / jnp.where(size > 0, size, 1), 0))
    # Where all agree the two sums are equal but for the sign, rounding included: P is exactly 0 or 1, and nothing is dropped.
    up = (share > uniform.astype(share.dtype))[None]
    return jnp.where(g > 0, up, jnp.where(g < 0, ~up, True))


def graddrop_gradients(gradients: Any, key: jax.Array, *, leak: ArrayLike = 0.0) -> Any:
    """(leak + (1 − leak) M_i) g_i for every group: leaves [G, ...] in and out; U is drawn from the key."""
    return jax.tree.map(lambda g, d: g + d, gradients, dropped(gradients, key, leak))


def dropped(gradients: Any, key: jax.Array, leak: ArrayLike) -> Any:
    """−(1 − leak) (1 − M_i) g_i: what GradDrop changes. Raises ValueError for complex gradients, which have no sign."""
    leaves, form = jax.tree.flatten(gradients)
    if wrong := [g.dtype for g in leaves if jnp.iscomplexobj(g)]:
        raise ValueError(
            f"graddrop needs real gradients, got {wrong[0]}. Write graddrop(mask=...), False for these parameters."
        )
    changes = []
    for g, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        mask = graddrop_mask(g, jax.random.uniform(k, g.shape[1:], wide(g).dtype))
        changes.append(jnp.where(mask, 0 * g, -(1 - jnp.asarray(leak, g.dtype)) * g))
    return jax.tree.unflatten(form, changes)


@method(
    target="gradient", direction=(), inference="prior", granularity="category",
    cite="Chen et al., NeurIPS 2020", gradient="replaces", off=dict(leak=1.0),
)  # fmt: skip
def graddrop(
    *, groups: Groups = "classes", leak: ArrayLike = 0.0, chunk: int | None = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs G + 1 more gradients a step (they share the forward pass), for G groups.

    Args:
      groups: "classes", "domains", or k: so many groups of classes with neighbouring indices.
      leak: share of the dropped gradients that passes after all, in [0, 1]; 1 is plain training.
      chunk: so many gradients at a time, for memory; None: all.
      mask: as in `pcgrad`.

    `update` takes what `pcgrad`'s does (`each=True`, too), and like it adds only what it changes to the gradient that it is given: put it first.
    """
    check_groups("graddrop", groups)
    check_number("graddrop", low=0, high=1, leak=leak)
    check_number("graddrop", low=1, chunk=chunk)

    def init(params):
        return GradDropState(jnp.zeros([], jnp.int32))

    def update(updates, state, params, *, grad_fn, key=None, each=False, **extra_args):
        require_weights("graddrop", grad_fn)
        require_key("graddrop", key)
        members = group_members("graddrop", groups, extra_args)
        gradients, _ = weighted_gradients(grad_fn, params, members, chunk=chunk)
        changes, after = dropped(gradients, key, leak), GradDropState(state.evaluations + len(members) + 1)
        return changes if each else added(updates, jax.tree.map(lambda d: d.sum(0), changes)), after

    return asking("graddrop", init, update, mask=mask)
