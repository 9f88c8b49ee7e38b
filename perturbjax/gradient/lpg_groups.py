"""Who shares a delta in LPG: the samples of a class, or nobody (`granularity="sample"`, the paper's future work)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from perturbjax.checks import check_choice
from perturbjax.classes import AxisName, class_count, class_mean

Granularity = Literal["category", "sample"]


class Groups(NamedTuple):
    """G groups of the B samples, as what the three forms of LPG do with them."""

    mean: Callable[[jax.Array], jax.Array]  # [B, ...] -> [G, ...], over all devices
    of_class: Callable[[jax.Array], jax.Array]  # [C] -> [G], a class's setting as its groups' own
    spread: Callable[[jax.Array], jax.Array]  # [G, ...] -> [B, ...], zeros for samples of no class (padding)
    weights: Callable[[Any], jax.Array]  # dtype -> [G, B], whose product with [B, ...] is this device's part of `mean`
    total: Callable[[Any], Any]  # sums a tree over the devices that a group spans


def lpg_groups(
    labels: jax.Array, num_classes: int, granularity: Granularity = "category", *, axis_name: AxisName = None
) -> Groups:
    """The groups of a batch: its C classes (also those that are absent), or its B samples."""
    check_choice("lpg", "granularity", granularity, ("category", "sample"))
    own = lambda x: x.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    if granularity == "sample":
        same = lambda x: x
        return Groups(same, own, same, lambda dtype: jnp.eye(labels.shape[0], dtype=dtype), same)

    def weights(dtype):
        count = class_count(labels, num_classes, axis_name=axis_name, dtype=dtype)
        return (jax.nn.one_hot(labels, num_classes, dtype=dtype) / jnp.maximum(count, 1)[None]).T

    def total(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    mean = lambda x: class_mean(x, labels, num_classes, axis_name=axis_name)
    return Groups(mean, lambda x: x, own, weights, total)
