r"""Gradient surgery (PCGrad): each group's gradient gives up what opposes another group's.

    for every group i, for every other group j in random order:   g̃_i ← g̃_i − min(0, ⟨g̃_i, g_j⟩)/‖g_j‖² · g_j,     g̃ = Σ_i g̃_i

g_j are the groups' original gradients, of classes, groups of classes or domains, over all parameters. Every g̃_i is a combination of
the g_j, so the whole procedure runs on their [G, G] inner products; the parameters are touched twice.
Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import wide
from perturbjax.gradient.groups import (
    Groups,
    added,
    check_groups,
    combined,
    group_members,
    require_key,
    require_weights,
    weighted_gradients,
)
from perturbjax.method import method
from perturbjax.parameter.asking import Mask, asking


class PCGradState(NamedTuple):
    """State of `pcgrad`."""

    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far


def inner_products(gradients: Any) -> jax.Array:
    """[G, G] inner products of gradients whose leaves are [G, ...], in at least float32; their real parts for complex ones."""
    flat = [wide(g).reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)]
    return functools.reduce(
        jnp.add, (jnp.real(jnp.matmul(g, jnp.conj(g).T, precision=jax.lax.Precision.HIGHEST)) for g in flat)
    )


def pcgrad_coefficients(products: jax.Array, order: jax.Array) -> jax.Array:
    """K [G, G] with g̃_i = Σ_j K[i, j] g_j.

    Args:
      products: [G, G], ⟨g_i, g_j⟩. A zero gradient neither changes nor is changed.
      order: [G, G] integers: row i says in which order g̃_i meets the groups (itself is passed over).

    >>> print(pcgrad_coefficients(jnp.array([[1.0, -0.5], [-0.5, 1.0]]), jnp.array([[0, 1], [0, 1]])))
    [[1.  0.5]
     [0.5 1. ]]
    """
    number = products.shape[0]
    groups = jnp.arange(number)

    def meet(own, others):  # own [G, G]: the rows so far; others [G]: whom each row meets now
        along = jnp.sum(own * products[:, others].T, axis=1)  # ⟨g̃_i, g_j⟩
        square = jnp.diagonal(products)[others]
        excess = jnp.where((others != groups) & (square > 0), jnp.minimum(along, 0) / jnp.where(square > 0, square, 1), 0)
        return own.at[groups, others].add(-excess), None

    # The start is made from the data: a fresh constant would not be allowed as a carry inside a checked shard_map.
    start = jnp.eye(number, dtype=products.dtype) + jnp.zeros_like(products)
    return jax.lax.scan(meet, start, order.T)[0]


def pcgrad_gradients(gradients: Any, key: jax.Array) -> Any:
    """The groups' gradients after surgery: leaves [G, ...] in, leaves [G, ...] out; the orders are drawn from the key."""
    products = inner_products(gradients)
    return combined(gradients, pcgrad_coefficients(products, random_orders(key, products.shape[0])))


def random_orders(key: jax.Array, number: int) -> jax.Array:
    """[G, G]: a random order of all groups for each group."""
    return jax.vmap(lambda k: jax.random.permutation(k, number))(jax.random.split(key, number))


@method(
    target="gradient", direction=(), inference="prior", granularity="category",
    cite="Yu et al., NeurIPS 2020", gradient="replaces", off=dict(groups=1),
)  # fmt: skip
def pcgrad(
    *, groups: Groups = "classes", reduction: Literal["sum", "mean"] = "sum", chunk: int | None = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs G + 1 more gradients a step (they share the forward pass), for G groups.

    Args:
      groups: "classes", "domains", or k: so many groups of classes with neighbouring indices, class c in group ⌊c·k/C⌋: with
        `longtail(...)`, whose classes are in the order of frequency, 3 are head, medium and tail.
      reduction: "sum" is the paper's; "mean" divides by the number of groups with a gradient, as code in use does: the step then
        shrinks by that factor, also where nothing conflicts.
      chunk: so many gradients at a time, for memory; None: all.
      mask: the parameters that it acts on, as in `optax.masked`; the others' gradients pass as they come. None: all.

    `update` takes `grad_fn=` (parameters, weights=[B] -> the gradient of the weighted loss, averaged over devices), `key=`, and
    `labels=` with `num_classes=` or `side=` with `num_domains=`. Put it first: to the gradient that it is given it adds what surgery
    changes in the batch's own, nothing where no two groups conflict. With `each=True` it returns these changes themselves, [G, ...],
    a row a group. BatchNorm's statistics are those of the whole batch.
    """
    check_groups("pcgrad", groups)
    check_choice("pcgrad", "reduction", reduction, ("sum", "mean"))
    check_number("pcgrad", low=1, chunk=chunk)

    def init(params):
        return PCGradState(jnp.zeros([], jnp.int32))

    def update(updates, state, params, *, grad_fn, key=None, each=False, **extra_args):
        require_weights("pcgrad", grad_fn)
        require_key("pcgrad", key)
        members = group_members("pcgrad", groups, extra_args)
        gradients, _ = weighted_gradients(grad_fn, params, members, chunk=chunk)
        products = inner_products(gradients)
        own = pcgrad_coefficients(products, random_orders(key, len(members)))
        if reduction == "mean":
            own = own / jnp.maximum(jnp.sum(jnp.diagonal(products) > 0), 1).astype(own.dtype)
        after = PCGradState(state.evaluations + len(members) + 1)
        if each:
            return combined(gradients, own - jnp.eye(len(members), dtype=own.dtype)), after
        return added(updates, combined(gradients, own.sum(0) - 1)), after

    return asking("pcgrad", init, update, mask=mask)
