"""Statistics by class (or by any other grouping): counts, means, running means, running covariances.

"Class mean" is the mean over the samples of the class in the batch; with `axis_name`, over the batches of all devices (sums
and counts are added over devices, then divided, so that devices with unequal shares count right). A class absent from the
batch gets zeros. Labels outside 0..C-1 (padding) belong to no class.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

AxisName = str | tuple[str, ...] | None


def at_least_float32(dtype: Any) -> Any:
    """float64 for float64, complex types as they are, float32 for everything else (narrower floats, integers, bool)."""
    return dtype if dtype in (jnp.float64, jnp.complex64, jnp.complex128) else jnp.float32


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32: bfloat16 and integers become float32, float64 and complex numbers stay."""
    return x.astype(at_least_float32(x.dtype))


def number(x: ArrayLike) -> jax.Array:
    """A setting as an array in at least float32: a Python number in JAX's own float type (float64 under x64), an array in its own."""
    array = jnp.asarray(x)
    known = jnp.issubdtype(array.dtype, jnp.floating) and not array.weak_type
    return jnp.asarray(array, at_least_float32(array.dtype) if known else jnp.result_type(float))


def own_entries(values: jax.Array, labels: jax.Array) -> jax.Array:
    """[B]: of each row of `values` [B, C] the entry of its label; of a label outside 0..C-1 (padding) that of the nearest class, never nan.

    >>> print(own_entries(jnp.array([[1, 2], [3, 4]]), jnp.array([1, 0])))
    [2 3]
    """
    nearest = jnp.clip(labels, 0, values.shape[1] - 1)
    return jnp.take_along_axis(values, nearest[:, None], axis=1)[:, 0]


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """All devices' shares [B, ...], one after the other; x itself without an axis."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def own_share(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """This device's share of what `gather` returned; x itself without an axis."""
    if axis_name is None:
        return x
    size = x.shape[0] // jax.lax.axis_size(axis_name)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * size, size)


def class_sum(values: jax.Array, labels: jax.Array, num_classes: int, *, axis_name: AxisName = None) -> jax.Array:
    """Sum of `values` [B, ...] over the samples of each class: [C, ...], in at least float32.

    A matrix product with the one-hot labels rather than a scatter: deterministic on GPUs, and cheap next to any layer.
    """
    values = wide(values)
    member = jax.nn.one_hot(labels, num_classes, dtype=values.dtype)
    flat = values.reshape(values.shape[0], -1)
    total = jnp.matmul(member.T, flat, precision=jax.lax.Precision.HIGHEST).reshape((num_classes,) + values.shape[1:])
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def class_count(labels: jax.Array, num_classes: int, *, axis_name: AxisName = None, dtype: Any = jnp.float32) -> jax.Array:
    """Number of samples of each class: [C], of the given float type."""
    return class_sum(jnp.ones(labels.shape, dtype), labels, num_classes, axis_name=axis_name)


def class_mean(values: jax.Array, labels: jax.Array, num_classes: int, *, axis_name: AxisName = None) -> jax.Array:
    """Mean of `values` [B, ...] over the samples of each class: [C, ...]; zeros where a class is absent.

    >>> print(class_mean(jnp.array([1.0, 3.0, 5.0]), jnp.array([0, 0, 2]), 3))
    [2. 0. 5.]
    """
    total = class_sum(values, labels, num_classes, axis_name=axis_name)
    count = jnp.maximum(class_count(labels, num_classes, axis_name=axis_name, dtype=total.dtype), 1)
    return total / count.reshape((num_classes,) + (1,) * (total.ndim - 1))


class RunningMean(NamedTuple):
    """A running mean by class."""

    mean: jax.Array  # [C, ...], the mean in use; zeros until the class has been seen
    seen: jax.Array  # [C] bool, whether `mean` holds anything yet
    total: jax.Array  # [C, ...], sum since the epoch began (update="epoch" only)
    count: jax.Array  # [C], samples since the epoch began (update="epoch" only)
    epoch: jax.Array  # [] int32, the epoch that total and count belong to


def running_mean_init(num_classes: int, shape: tuple[int, ...] = (), *, dtype: Any = None) -> RunningMean:
    """The state before any sample, for values of the given shape per sample; dtype None: JAX's own float type."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    zeros = jnp.zeros((num_classes, *shape), dtype)
    return RunningMean(zeros, jnp.zeros([num_classes], bool), zeros, jnp.zeros([num_classes], dtype), jnp.int32(0))


def running_mean_update(
    state: RunningMean,
    values: jax.Array,
    labels: jax.Array,
    *,
    update: Literal["step", "epoch"] = "step",
    decay: ArrayLike = 0.9,
    epoch: ArrayLike = 0,
    axis_name: AxisName = None,
) -> RunningMean:
    """The running class mean after one more batch of `values` [B, ...].

    update="step": mean ← decay·mean + (1 − decay)·batch mean, for classes in the batch; the first batch of a class sets it.
    update="epoch": sums are exact over the epoch, and become the mean in use when the next epoch begins (LPG, LPA:
    Algorithm 1, line 3); during the first epoch no class is seen.
    """
    num_classes = state.seen.shape[0]
    column = (num_classes,) + (1,) * (state.mean.ndim - 1)
    values = jax.lax.stop_gradient(values)
    total = class_sum(values, labels, num_classes, axis_name=axis_name).astype(state.mean.dtype)
    count = class_count(labels, num_classes, axis_name=axis_name, dtype=state.count.dtype)
    if update == "step":
        now = total / jnp.maximum(count, 1).reshape(column)
        decay = jnp.asarray(decay, state.mean.dtype)
        moved = jnp.where(state.seen.reshape(column), decay * state.mean + (1 - decay) * now, now)
        here = count > 0
        return state._replace(mean=jnp.where(here.reshape(column), moved, state.mean), seen=state.seen | here)
    new_epoch = jnp.asarray(epoch, jnp.int32) != state.epoch
    finished = new_epoch & (state.count > 0)
    mean = jnp.where(finished.reshape(column), state.total / jnp.maximum(state.count, 1).reshape(column), state.mean)
    kept = lambda sums: jnp.where(new_epoch, 0, sums)  # not 0·sums, which would keep a nan for ever
    return RunningMean(
        mean=mean,
        seen=state.seen | finished,
        total=kept(state.total) + total,
        count=kept(state.count) + count,
        epoch=jnp.asarray(epoch, jnp.int32),
    )


class RunningCovariance(NamedTuple):
    """Exact running mean and covariance of a vector by class (every sample so far counts the same)."""

    count: jax.Array  # [C]
    mean: jax.Array  # [C, d]
    covariance: jax.Array  # [C, d, d], divided by the count (not count − 1)


def running_covariance_init(num_classes: int, dim: int, *, dtype: Any = None) -> RunningCovariance:
    """The state before any sample: zero covariance; dtype None: JAX's own float type."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    zeros = jnp.zeros([num_classes, dim], dtype)
    return RunningCovariance(jnp.zeros([num_classes], dtype), zeros, jnp.zeros([num_classes, dim, dim], dtype))


def running_covariance_update(
    state: RunningCovariance, values: jax.Array, labels: jax.Array, *, axis_name: AxisName = None
) -> RunningCovariance:
    """The state after one more batch of `values` [B, d], by Chan's parallel formula:

    Σ ← (n Σ + m Σ_batch)/(n + m) + n m/(n + m)² · (μ − μ_batch)(μ − μ_batch)ᵀ
    """
    num_classes = state.count.shape[0]
    values = wide(jax.lax.stop_gradient(values)).astype(state.mean.dtype)
    batch_count = class_count(labels, num_classes, axis_name=axis_name, dtype=state.count.dtype)
    batch_mean = class_mean(values, labels, num_classes, axis_name=axis_name)
    centred = values - batch_mean[labels]
    # [C, d, d] without a [B, d, d] array in between: one matrix product per class, batched.
    member = jax.nn.one_hot(labels, num_classes, dtype=centred.dtype)
    scatter = jnp.einsum("bc,bi,bj->cij", member, centred, centred, precision=jax.lax.Precision.HIGHEST)
    if axis_name is not None:
        scatter = jax.lax.psum(scatter, axis_name)
    count = state.count + batch_count
    share = batch_count / jnp.maximum(count, 1)
    gap = state.mean - batch_mean
    old, new = (1 - share)[:, None, None], share[:, None, None]
    within = old * state.covariance + scatter / jnp.maximum(count, 1)[:, None, None]
    between = old * new * gap[:, :, None] * gap[:, None, :]
    return RunningCovariance(count, state.mean - share[:, None] * gap, within + between)
