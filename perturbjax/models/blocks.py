"""What the convolutional models are made of."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax

from perturbjax.frozen import covered
from perturbjax.models.conv import conv_general_dilated
from perturbjax.models.net import Net, at_least_float32
from perturbjax.models.shake import Branch, Scaled

CONVOLUTIONS: dict[str, Callable[..., jax.Array]] = {"canonical": conv_general_dilated, "lax": lax.conv_general_dilated}

MOMENTUM = 0.9
"""Of BatchNorm's running statistics: what a step leaves of them."""


class Ops(NamedTuple):
    """The operations of a block; each names the submodule it makes."""

    convolution: Callable
    initializer: Callable
    dropout: float
    dtype: Any
    train: bool
    branch: Branch = Branch()
    frozen: tuple[str, ...] = ()  # prefixes of modules whose BatchNorm runs on its running statistics, in training too
    frozen_batchnorm: bool = False  # every BatchNorm does

    def conv(
        self, name: str, x: jax.Array, features: int, stride: int = 1, size: int = 3, padding: int | None = None
    ) -> jax.Array:
        # The padding is written out: "SAME" would pad (0, 1) at stride 2, half a pixel off the shortcut x[:, ::2, ::2].
        edge = size // 2 if padding is None else padding
        padding = [(edge, edge)] * 2
        options = dict(use_bias=False, dtype=self.dtype, kernel_init=self.initializer, conv_general_dilated=self.convolution)
        return nn.Conv(features, (size, size), (stride, stride), padding, name=name, **options)(x)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        norm = nn.BatchNorm(momentum=MOMENTUM, epsilon=1e-5, dtype=wide, name=name)
        running = not self.train or self.frozen_batchnorm or covered("/".join(norm.path), self.frozen)
        return norm(x.astype(wide), running).astype(self.dtype)  # as flax does it, but without implicit promotion

    def drop(self, name: str, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=not self.train, name=name)(x)

    def residual(self, name: str, x: jax.Array) -> jax.Array:
        """The value of a residual branch, as it is added to the shortcut."""
        return x if self.branch.rate == 0 else Scaled(self.branch, self.train, name=name)(x)


class ConvNet(Net, kw_only=True):
    """width: channels of the stem. conv: "canonical" (fast inside loops on CPU) or "lax" (allows forward mode).

    remat: keep only what goes from block to block for the backward pass, and compute the inside of each block once more there: less
    memory, up to a third more work, the same numbers to rounding and the same variables. On a CPU, XLA takes the two computations
    for one and saves nothing, unless it compiles under KEEP_REMAT.

    frozen_batchnorm: every BatchNorm runs on its running statistics and leaves them as they are, in training as at evaluation; scales and
    shifts are trained unless they are `frozen`.
    """

    width: int = 16
    conv: str = "canonical"
    remat: bool = False
    frozen_batchnorm: bool = False

    fan = "fan_in"  # of He's initialisation

    def __post_init__(self):
        super().__post_init__()
        if self.conv not in CONVOLUTIONS:
            raise ValueError(
                f'{type(self).__name__} needs conv among {tuple(CONVOLUTIONS)}, got {self.conv!r}. Write conv="canonical".'
            )

    def ops(self, train: bool) -> Ops:
        he = nn.initializers.variance_scaling(2.0, self.fan, "normal")
        frozen = dict(frozen=self.frozen, frozen_batchnorm=self.frozen_batchnorm)
        return Ops(CONVOLUTIONS[self.conv], he, self.dropout, self.dtype, train, **frozen)

    def block(self, kind: type[nn.Module]) -> type[nn.Module]:
        """This kind of block, recomputed in the backward pass if `remat`. Blocks are named where they are made: names stay."""
        return _recomputed(kind) if self.remat else kind


_recomputed = functools.cache(nn.remat)  # one class per kind, however often the layers are listed

KEEP_REMAT = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Compiler options, `jax.jit(step, compiler_options=KEEP_REMAT)`, under which remat saves memory on a CPU; GPUs and TPUs need none.
Compiled for the CPU, the gradient of resnet20 on 128 images of 32x32 needs 88 MiB with remat, 284 MiB without; that of resnet110 on
32 images 77 and 389 MiB. Not measured on GPUs."""


class Unit(nn.Module):
    """relu(norm(conv(x))). padding: pixels on each side; 1 keeps the size."""

    features: int
    stride: int
    ops: Ops
    padding: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.ops.conv("conv", x, self.features, self.stride, padding=self.padding)
        return nn.relu(self.ops.norm("norm", y))


class Stage(nn.Module):
    """Blocks in a row; the first one has the stride. branches: what happens on each block's branch; None: nothing. first: the kind of
    the first block; None: that of the others."""

    block: Callable[..., nn.Module]
    num_blocks: int
    features: int
    stride: int
    ops: Ops
    branches: tuple[Branch, ...] | None = None
    first: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.ops.dtype)  # a slice may start from a value of another type
        for i in range(self.num_blocks):
            ops = self.ops if self.branches is None else self.ops._replace(branch=self.branches[i])
            block = self.first if i == 0 and self.first is not None else self.block
            x = block(self.features, self.stride if i == 0 else 1, ops, name=f"block{i}")(x)
        return x
