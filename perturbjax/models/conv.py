"""A 2-D convolution whose gradients are convolutions of the same form (NHWC images, HWIO kernel).

    y[i] = Σ_k x[i·s + k·d − lo] · w[k]
    ∂ℓ/∂x = conv(g dilated by s, w flipped and with its channels swapped)
    ∂ℓ/∂w = conv(x with batch and channels swapped, g dilated by s, as kernel)

These are JAX's own rules, bit for bit; JAX writes them with permuted dimension numbers, this file with transposed arrays. The
difference matters on XLA:CPU: inside `scan`, `fori_loop`, `while_loop` or `cond`, a convolution with permuted dimension numbers
misses the fast kernel and runs 10 to 50 times slower (jax-ml/jax#12868). The price is forward mode: `jax.jvp` through it raises.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _Geometry(NamedTuple):
    """Everything static about a convolution; hashable."""

    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    x_dilation: tuple[int, int]
    kernel_dilation: tuple[int, int]
    precision: lax.PrecisionLike


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type=None,
    **newer,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with gradients of its own form, for `nn.Conv(conv_general_dilated=...)`.

    lhs [B, H, W, I] and rhs [h, w, I, O] of one dtype give [B, H', W', O]. What else lax allows (other layouts and ranks, groups,
    another accumulation type) is handed to lax as it is.
    """
    x_dilation, kernel_dilation = tuple(lhs_dilation or (1, 1)), tuple(rhs_dilation or (1, 1))
    covered = (
        (lhs.ndim, lhs.dtype) == (4, rhs.dtype)
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and (feature_group_count, batch_group_count, preferred_element_type) == (1, 1, None)
        and not newer
        and not (isinstance(padding, str) and x_dilation != (1, 1))  # lax's error, not ours
    )
    if not covered:
        options = dict(newer, feature_group_count=feature_group_count, batch_group_count=batch_group_count)
        options |= dict(precision=precision, preferred_element_type=preferred_element_type)
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **options
        )
    if isinstance(padding, str):
        window = [_dilated(size, dilation) for size, dilation in zip(rhs.shape[:2], kernel_dilation)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    padding = tuple((lo, hi) for lo, hi in padding)
    return _conv(lhs, rhs, _Geometry(tuple(window_strides), padding, x_dilation, kernel_dilation, precision))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, geometry):
    stride, padding, x_dilation, kernel_dilation, precision = geometry
    return lax.conv_general_dilated(
        x, kernel, stride, padding, x_dilation, kernel_dilation, dimension_numbers=_LAYOUT, precision=precision
    )


def _forward(x, kernel, geometry):
    return _conv(x, kernel, geometry), (x, kernel)


def _backward(geometry, residuals, g):
    """Both gradients call `_conv` again, so that those of any order keep the form."""
    (x, kernel), (stride, padding, x_dilation, kernel_dilation, precision) = residuals, geometry
    x_padding, kernel_padding = [], []
    # On the dilated grids, size n, padded by lo and hi, and window k give size n + lo + hi − k + 1.
    for axis in range(2):
        n = _dilated(x.shape[1 + axis], x_dilation[axis])
        k = _dilated(kernel.shape[axis], kernel_dilation[axis])
        m = _dilated(g.shape[1 + axis], stride[axis])
        lo = padding[axis][0]
        x_padding.append((k - 1 - lo, n - m + lo))  # m + lo' + hi' − k + 1 = n
        kernel_padding.append((lo, k + m - n - lo - 1))  # n + lo + hi' − m + 1 = k
    to_x = _Geometry(x_dilation, tuple(x_padding), stride, kernel_dilation, precision)
    to_kernel = _Geometry(kernel_dilation, tuple(kernel_padding), x_dilation, stride, precision)
    x_bar = _conv(g, lax.rev(kernel.transpose(0, 1, 3, 2), (0, 1)), to_x)
    kernel_bar = _conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), to_kernel).transpose(1, 2, 0, 3)
    return x_bar, kernel_bar


_conv.defvjp(_forward, _backward)


def _dilated(size: int, dilation: int) -> int:
    return (size - 1) * dilation + 1 if size else 0
