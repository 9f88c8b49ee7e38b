r"""Residual networks for small images.

    ResNet      y = relu(norm(conv(relu(norm(conv(x))))) + S x)      S: every stride-th pixel, missing channels are zero (option A);
                                                                     or, where the shape changes, norm(1x1 convolution of x) (option B)
    WideResNet  y = conv(drop(relu(norm(conv(h))))) + S x            h = relu(norm(x)); S x = x, or a 1x1 convolution of h
    ShakeResNet y = α F₁(x) + (1 − α) F₂(x) + S x                    F(x) = norm(conv(drop(relu(norm(conv(relu(x)))))))
    SEResNet    y = relu(s ⊙ F(x) + S x)                             F as in ResNet; s = sigmoid(W₂ relu(W₁ F̄)), F̄ its mean over pixels;
                                                                     S as in option B
    LANet       y = relu(F(x) + S x)                                 F = norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x))))))));
                                                                     S as in option B, and in the first block of every stage

The branches of all but ShakeResNet may be switched off or shaken at random: stochastic depth, ShakeDrop (shake.py).
Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016. Gastaldi, "Shake-Shake Regularization", 2017, and its code.
Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018; in the form of ISDA's experiments (Wang et al., NeurIPS 2019, and their code).
LANet: the "ResNet-32" of a reimplementation of Menon et al., ICLR 2021 (github.com/Chumsy0725/logit-adj-pytorch), and of LPL's code for
the long tail.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from perturbjax.checks import check_number
from perturbjax.models.blocks import ConvNet, Ops, Stage, Unit
from perturbjax.models.net import Features, pooled
from perturbjax.models.shake import Branch, Shaken, branches


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

    @property
    def branches(self) -> tuple[Branch, ...] | None:
        """What happens on the branch of each block, from the first stage to the last."""
        return None

    def stages(self, block, width: int, ops: Ops):
        n, drawn = (self.depth - self.outside) // 6, self.branches
        of = lambda i: None if drawn is None else drawn[i * n : (i + 1) * n]
        return {f"stage{i + 1}": partial(Stage, block, n, width * 2**i, 1 + (i > 0), ops, of(i)) for i in range(3)}


class OneBranch(Residual, kw_only=True):
    """stochastic_depth, shakedrop: 1 − p_L, the rate at which the last block's branch is switched off, or shaken, for a sample; it
    rises linearly over the blocks. The papers' is 0.5; 0: never. One of the two."""

    stochastic_depth: float = 0.0
    shakedrop: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_number(type(self).__name__, low=0, high=1, stochastic_depth=self.stochastic_depth, shakedrop=self.shakedrop)
        if self.stochastic_depth and self.shakedrop:
            raise ValueError(
                f"{type(self).__name__} needs one of stochastic_depth and shakedrop, got both ({self.stochastic_depth} and "
                f"{self.shakedrop}). Leave out one: ShakeDrop switches branches off too."
            )

    @property
    def branches(self):
        if not (self.stochastic_depth or self.shakedrop):
            return None
        kind = "shakedrop" if self.shakedrop else "stochastic_depth"
        return branches(kind, self.shakedrop or self.stochastic_depth, (self.depth - self.outside) // 2)


class ResNet(OneBranch, kw_only=True):
    """depth = 6n + 2. Stages of width, 2·width and 4·width channels.

    shortcut: "A", without parameters, or "B", with a convolution where the shape changes.
    """

    depth: int = 20
    shortcut: Literal["A", "B"] = "A"

    outside = 2

    def __post_init__(self):
        super().__post_init__()
        if self.shortcut not in ("A", "B"):
            raise ValueError(f'ResNet needs shortcut="A" or shortcut="B", got {self.shortcut!r}. Write shortcut="A".')

    def layers(self, train):
        ops = self.ops(train)
        stem, block = partial(self.block(Unit), self.width, 1, ops), partial(self.block(Block), shortcut=self.shortcut)
        return {"stem": stem} | self.stages(block, self.width, ops) | {"features": Features}


class LANet(OneBranch, kw_only=True):
    """depth = 6n + 2, as its authors count it: n blocks of three convolutions in each stage, 9n + 2 layers. Stages of width, 2·width and
    4·width channels, of three pixels' padding before the stem (36x36 of 32x32), and a norm before the pooling."""

    depth: int = 32

    outside = 2

    def layers(self, train):
        ops, block = self.ops(train), self.block(NarrowBlock)
        stem = partial(self.block(Unit), self.width, 1, ops, padding=3)
        stages = self.stages(partial(block, projected=False), self.width, ops)
        stages = {site: partial(stage, first=partial(block, projected=True)) for site, stage in stages.items()}
        return {"stem": stem} | stages | {"features": partial(NormalisedFeatures, ops)}


class SEResNet(OneBranch, kw_only=True):
    """depth = 6n + 2, as ResNet, with squeeze-and-excitation on every branch and option B's shortcuts.

    reduction: of channels between W₁ and W₂, to one at least.
    """

    depth: int = 110
    reduction: int = 16

    outside, fan = 2, "fan_out"

    def __post_init__(self):
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError(f"SEResNet needs reduction >= 1, got {self.reduction}. Write reduction=16.")

    def layers(self, train):
        ops = self.ops(train)
        stem, block = (
            partial(self.block(Unit), self.width, 1, ops),
            partial(self.block(Block), shortcut="B", reduction=self.reduction),
        )
        return {"stem": stem} | self.stages(block, self.width, ops) | {"features": Features}


class WideResNet(OneBranch, kw_only=True):
    """depth = 6n + 4. Stages of widen·width·(1, 2, 4) channels after a stem of width channels."""

    depth: int = 28
    widen: int = 10

    outside, fan = 4, "fan_out"

    def layers(self, train):
        ops = self.ops(train)
        stem, features = partial(Convolution, self.width, ops), partial(ActivatedFeatures, ops)
        return (
            {"stem": stem} | self.stages(self.block(PreActivationBlock), self.widen * self.width, ops) | {"features": features}
        )


class ShakeResNet(Residual, kw_only=True):
    """depth = 6n + 2; two branches a block. Stages of widen·width·(1, 2, 4) channels after a stem of width channels.

    shake: mix the branches at random (Shake-Shake, per sample); False: their mean, the same network without it.
    """

    depth: int = 26
    widen: int = 2
    shake: bool = True

    outside, fan = 2, "fan_out"

    def layers(self, train):
        ops = self.ops(train)
        block = partial(self.block(TwoBranchBlock), shake=self.shake)
        stages = self.stages(block, self.widen * self.width, ops)
        return {"stem": partial(NormalisedConvolution, self.width, ops)} | stages | {"features": RectifiedFeatures}


class Block(nn.Module):
    """relu(s ⊙ norm(conv(relu(norm(conv(x))))) + S x); reduction: of the excitation s, None: no s."""

    features: int
    stride: int
    ops: Ops
    shortcut: Literal["A", "B"] = "A"
    reduction: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops = self.ops
        y = nn.relu(ops.norm("norm1", ops.conv("conv1", x, self.features, self.stride)))
        y = ops.norm("norm2", ops.conv("conv2", ops.drop("drop", y), self.features))
        if self.reduction is not None:
            y = Excitation(self.reduction, name="excitation")(y)
        y = ops.residual("branch", y)
        if self.shortcut == "A" or same_shape(x, self.features, self.stride):
            return nn.relu(y + subsampled(x, self.features, self.stride))
        return nn.relu(y + projection(ops, x, self.features, self.stride))


class NarrowBlock(nn.Module):
    """relu(norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))) + S x), all convolutions with the same channels.

    projected: whether S is a convolution; otherwise the shape must not change.
    """

    features: int
    stride: int
    ops: Ops
    projected: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops = self.ops
        y = nn.relu(ops.norm("norm1", ops.conv("conv1", x, self.features, size=1)))
        y = nn.relu(ops.norm("norm2", ops.conv("conv2", y, self.features, self.stride)))
        y = ops.residual("branch", ops.norm("norm3", ops.conv("conv3", ops.drop("drop", y), self.features, size=1)))
        return nn.relu(y + (projection(ops, x, self.features, self.stride) if self.projected else x))


class Excitation(nn.Module):
    """s ⊙ x: every channel by a factor in (0, 1) that depends on the means of all; both layers have no bias."""

    reduction: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = pooled(x)
        dense = partial(nn.Dense, use_bias=False, dtype=mean.dtype, kernel_init=LINEAR)
        inner = nn.relu(dense(max(1, x.shape[-1] // self.reduction), name="squeeze")(mean))
        factors = nn.sigmoid(dense(x.shape[-1], name="excite")(inner))
        return factors.astype(x.dtype)[:, None, None] * x


LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(±1/√fan-in), as in that code


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
        y = ops.residual("branch", ops.conv("conv2", ops.drop("drop", y), self.features))
        same = same_shape(x, self.features, self.stride)
        return y + (x if same else ops.conv("shortcut", h, self.features, self.stride, size=1))


class TwoBranchBlock(nn.Module):
    """α F₁(x) + (1 − α) F₂(x) + S x, with F = norm(conv(drop(relu(norm(conv(relu(x))))))).

    S x = x; where the shape changes, 1x1 convolutions of relu(x) at every stride-th pixel and at those one up and left, half of the
    channels each, normalised together.
    """

    features: int
    stride: int
    ops: Ops
    shake: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ops, h = self.ops, nn.relu(x)

        def branch(i: int) -> jax.Array:
            y = nn.relu(ops.norm(f"norm{i}1", ops.conv(f"conv{i}1", h, self.features, self.stride)))
            return ops.norm(f"norm{i}2", ops.conv(f"conv{i}2", ops.drop(f"drop{i}", y), self.features))

        y = Shaken(self.shake, ops.train, name="shake")(branch(1), branch(2))
        if same_shape(x, self.features, self.stride):
            return y + x
        shifted = jnp.pad(h, [(0, 0), (1, 0), (1, 0), (0, 0)])[:, :-1, :-1]
        half = self.features // 2
        paths = [
            ops.conv("shortcut1", h, half, self.stride, size=1),
            ops.conv("shortcut2", shifted, self.features - half, self.stride, size=1),
        ]
        return y + ops.norm("shortcut_norm", jnp.concatenate(paths, axis=-1))


class NormalisedConvolution(nn.Module):
    """The stem before two-branch blocks: norm(conv(x))."""

    features: int
    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ops.norm("norm", self.ops.conv("conv", x, self.features))


class RectifiedFeatures(nn.Module):
    """The pooled features after two-branch blocks, which leave the last activation to be done."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return pooled(nn.relu(x))


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


class NormalisedFeatures(nn.Module):
    """The pooled features after a norm."""

    ops: Ops

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return pooled(self.ops.norm("norm", x))


def same_shape(x: jax.Array, features: int, stride: int) -> bool:
    """Whether a block with these leaves the shape of x as it is."""
    return x.shape[-1] == features and stride == 1


def projection(ops: Ops, x: jax.Array, features: int, stride: int) -> jax.Array:
    """norm(1x1 convolution of every stride-th pixel of x): option B."""
    return ops.norm("shortcut_norm", ops.conv("shortcut", x, features, stride, size=1))


def subsampled(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Every stride-th pixel of x, between as many zero channels as are missing: option A, without parameters."""
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], [(0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)])
