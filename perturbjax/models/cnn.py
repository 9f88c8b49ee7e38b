"""A small convolutional net for 8x8 to 32x32 images, fast on a CPU."""

from functools import partial

import flax.linen as nn
import jax

from perturbjax.models.blocks import ConvNet, Ops, Unit
from perturbjax.models.net import Features


class CNN(ConvNet, kw_only=True):
    """A stem of width channels, then stages of one convolution that halve the image and double the channels."""

    num_stages: int = 2

    @property
    def smallest(self):
        return 2**self.num_stages

    def layers(self, train):
        ops = self.ops(train)
        stages = {f"stage{i}": partial(self.block(Halving), self.width * 2**i, ops) for i in range(1, self.num_stages + 1)}
        return {"stem": partial(self.block(Unit), self.width, 1, ops)} | stages | {"features": Features}


class Halving(nn.Module):
    """drop(relu(norm(conv(x)))) at every second pixel."""

    features: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops = self.ops
        return ops.drop("drop", nn.relu(ops.norm("norm", ops.conv("conv", x, self.features, stride=2))))
