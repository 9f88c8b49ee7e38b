r"""Residual networks for small images.

    ResNet      y = relu(norm(conv(relu(norm(conv(x))))) + S x)      S: every stride-th pixel, missing channels are zero (option A)
    WideResNet  y = conv(drop(relu(norm(conv(h))))) + S x            h = relu(norm(x)); S x = x, or a 1x1 convolution of h

Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from perturbjax.models.blocks import ConvNet, Ops, Stage, Unit
from perturbjax.models.net import Features, pooled


class Residual(ConvNet, kw_only=True):
    """What both have: a stem and three stages of n blocks, dropout between a block's two convolutions."""

    depth: int

    smallest, outside = 4, 0  # outside: layers of the depth that are in no block

    def __post_init__(self):
        super().__post_init__()
        if self.depth <= self.outside or (self.depth - self.outside) % 6:
            raise ValueError(
                f"{type(self).__name__} needs depth = 6n + {self.outside}, got {self.depth}. "
                f"Write depth={6 * max(self.depth // 6, 1) + self.outside}."
            )

    def stages(self, block, width: int, ops: Ops):
        n = (self.depth - self.outside) // 6
        return {f"stage{i + 1}": partial(Stage, self.block(block), n, width * 2**i, 1 + (i > 0), ops) for i in range(3)}


class ResNet(Residual, kw_only=True):
    """depth = 6n + 2. Stages of width, 2·width and 4·width channels."""

    depth: int = 20

    outside = 2

    def layers(self, train):
        ops = self.ops(train)
        stem = partial(self.block(Unit), self.width, 1, ops)
        return {"stem": stem} | self.stages(Block, self.width, ops) | {"features": Features}


class WideResNet(Residual, kw_only=True):
    """depth = 6n + 4. Stages of widen·width·(1, 2, 4) channels after a stem of width channels."""

    depth: int = 28
    widen: int = 10

    outside, fan = 4, "fan_out"

    def layers(self, train):
        ops = self.ops(train)
        stem, features = partial(Convolution, self.width, ops), partial(ActivatedFeatures, ops)
        return {"stem": stem} | self.stages(PreActivationBlock, self.widen * self.width, ops) | {"features": features}


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + S x)."""

    features: int
    stride: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops = self.ops
        y = nn.relu(ops.norm("norm1", ops.conv("conv1", x, self.features, self.stride)))
        y = ops.norm("norm2", ops.conv("conv2", ops.drop("drop", y), self.features))
        return nn.relu(y + subsampled(x, self.features, self.stride))


class PreActivationBlock(nn.Module):
    """conv(drop(relu(norm(conv(h))))) + S x with h = relu(norm(x))."""

    features: int
    stride: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops = self.ops
        h = nn.relu(ops.norm("norm1", x))
        y = nn.relu(ops.norm("norm2", ops.conv("conv1", h, self.features, self.stride)))
        y = ops.conv("conv2", ops.drop("drop", y), self.features)
        same = x.shape[-1] == self.features and self.stride == 1
        return y + (x if same else ops.conv("shortcut", h, self.features, self.stride, size=1))


class Convolution(nn.Module):
    """The stem before pre-activation blocks: nothing but a convolution."""

    features: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ops.conv("conv", x, self.features)


class ActivatedFeatures(nn.Module):
    """The pooled features after pre-activation blocks, which leave the last activation to be done."""

    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return pooled(nn.relu(self.ops.norm("norm", x)))


def subsampled(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Every stride-th pixel of x, between as many zero channels as are missing: option A, without parameters."""
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], [(0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)])
