r"""Random factors on the residual branches of a network: stochastic depth, ShakeDrop and Shake-Shake.

    stochastic depth   y = x + b F(x),                          b ~ Bernoulli(p_l);             evaluation p_l F(x)
    ShakeDrop          y = x + (b + α − b α) F(x),              α ~ U(−1, 1), backward β ~ U(0, 1) for α;     p_l F(x)
    Shake-Shake        y = x + α F₁(x) + (1 − α) F₂(x),         α ~ U(0, 1), backward β ~ U(0, 1) for α;      ½ F₁(x) + ½ F₂(x)

p_l = 1 − (l/L)·rate falls linearly over the blocks l = 1 … L. The backward pass multiplies by factors of its own draw: the gradient is
not that of the forward pass, on purpose. Every sample has its own draws, from the rng "dropout"; the model does not know where a sample
stands in the data set, so they go by its place in the batch. (Stochastic depth's paper draws once for the whole batch.)

What is searched for below such a branch in training (AT, UAT, LPA at an earlier site) goes by the same backward pass, so with ShakeDrop
and Shake-Shake its δ follows the gradient with β in place of α, not the loss's own: where a factor is negative, and β is not, even the
sign of the branch's part differs. A larger loss is then likely, not sure. The passes have the same forward factors, so the losses that a
search compares are those of the training pass; sites after the last block, stochastic depth and evaluation (`--attack`) are not
concerned.
Sources: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016. Yamada et al., "ShakeDrop Regularization for Deep Residual
Learning", IEEE Access 2019 (arXiv 2018). Gastaldi, "Shake-Shake Regularization", 2017, and its code.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def scaled(x: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    """forward · x, whose gradient is backward · g: x [B, ...], a factor [B] for each sample. No gradient reaches the factors.

    Reverse mode only: `jax.jvp` through it raises.

    >>> jax.grad(lambda x: scaled(x, jnp.array([2.0]), jnp.array([5.0])).sum())(jnp.ones([1, 1])).item()
    5.0
    """
    return _times(forward, x)


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x


scaled.defvjp(
    lambda x, forward, backward: (_times(forward, x), (forward, backward)),
    lambda kept, g: (_times(kept[1], g), jnp.zeros_like(kept[0]), jnp.zeros_like(kept[1])),
)


class Branch(NamedTuple):
    """What happens on the residual branch of one block."""

    kind: Literal["stochastic_depth", "shakedrop"] = "stochastic_depth"
    rate: float = 0.0  # 1 − p_l


def branches(kind: Literal["stochastic_depth", "shakedrop"], rate: float, count: int) -> tuple[Branch, ...]:
    """Of blocks 1 … count, in order: 1 − p_l = (l/count)·rate.

    >>> [branch.rate for branch in branches("shakedrop", 0.5, 2)]
    [0.25, 0.5]
    """
    return tuple(Branch(kind, number / count * rate) for number in range(1, count + 1))


def branch_factors(key: jax.Array, count: int, branch: Branch) -> tuple[jax.Array, jax.Array]:
    """(forward, backward) factors of `count` samples: [B] each, float32; the same ones for stochastic depth."""
    keep, *shakes = jax.random.split(key, 3)
    b = jax.random.bernoulli(keep, 1 - branch.rate, [count]).astype(jnp.float32)
    if branch.kind == "stochastic_depth":
        return b, b
    draw = lambda key, low: jax.random.uniform(key, [count], jnp.float32, low, 1)
    alpha, beta = draw(shakes[0], -1), draw(shakes[1], 0)
    return b + alpha - b * alpha, b + beta - b * beta


class Scaled(nn.Module):
    """A residual branch times its factor: drawn in training, its expectation p_l at evaluation. The gradient in training has another
    factor for ShakeDrop, also for who searches for a perturbation below (see above)."""

    branch: Branch
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.train:
            return x * np.asarray(1 - self.branch.rate, x.dtype)
        return scaled(x, *branch_factors(self.make_rng("dropout"), x.shape[0], self.branch))


class Shaken(nn.Module):
    """α x + (1 − α) y in training, with β in the backward pass, also for who searches for a perturbation below (see above);
    (x + y)/2 at evaluation, and always if not `shake`."""

    shake: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if not (self.train and self.shake):
            half = np.asarray(0.5, x.dtype)
            return half * x + half * y
        alpha, beta = jax.random.uniform(self.make_rng("dropout"), [2, x.shape[0]], jnp.float32)
        return scaled(x, alpha, beta) + scaled(y, 1 - alpha, 1 - beta)
