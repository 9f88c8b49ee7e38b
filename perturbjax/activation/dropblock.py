r"""DropBlock: dropout of contiguous blocks of positions instead of single ones.

    blocks start where m ~ Bernoulli(γ) says so,   γ = rate/b² · HW/((H − b + 1)(W − b + 1)),   ã = a ⊙ k · count(k)/Σ k

k [H, W] is 0 inside the blocks and 1 elsewhere; b = min(block_size, H). γ makes the expected share of dropped positions `rate`, but for
overlaps. Only whole blocks are drawn; the factor at the end is of the whole batch, all devices together. rate rises linearly from 0
over training. Evaluation needs nothing; the draws follow the sample's position in the data set. Any number of axes between the first
and the last one will do: in texts [B, L, d] blocks are runs of words, and of a vector [B, d] single entries.
Source: Ghiasi, Lin, Le, "DropBlock: A Regularization Method for Convolutional Networks", NeurIPS 2018, Algorithm 1.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, number
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method


def dropblock_gamma(space: tuple[int, ...], *, rate: ArrayLike, block_size: int, border: bool = True) -> jax.Array:
    """γ [], the probability of a block at each place where one may start, on maps of the sizes `space`.

    >>> print(dropblock_gamma((8, 8), rate=0.25, block_size=2).round(3))  # 0.25/4 · 64/49
    0.082
    """
    sizes = [min(block_size, n) for n in space]
    places = math.prod(n - b + 1 for n, b in zip(space, sizes)) if border else math.prod(space)
    return number(rate) * (math.prod(space) / (math.prod(sizes) * places))


def dropblock_kept(starts: jax.Array, space: tuple[int, ...], *, block_size: int, border: bool = True) -> jax.Array:
    """k [B, *space, channels], 1 outside the blocks and 0 inside: bool.

    starts: bool [B, *places, channels]. With `border` a place is the first position of a block, and there are n − b + 1 along an axis;
    without, it is the middle one (of an even block the one before the middle), there are n, and blocks are cut at the border.
    """
    blocks = starts
    for axis, n in enumerate(space, start=1):
        b = min(block_size, n)
        window, padding = [1] * starts.ndim, [(0, 0)] * starts.ndim
        window[axis], padding[axis] = b, (b - 1, b - 1) if border else (b // 2, (b - 1) // 2)
        blocks = jax.lax.reduce_window(blocks, False, jax.lax.bitwise_or, window, [1] * starts.ndim, padding)
    return ~blocks


def dropblock_mask(
    key: jax.Array,
    index: jax.Array,
    shape: tuple[int, ...],
    *,
    rate: ArrayLike,
    block_size: int = 7,
    border: bool = True,
    share_channels: bool = False,
    axis_name: AxisName = None,
) -> jax.Array:
    """k · count(k)/Σ k: [B, *shape], of the type of the rate, with mean 1; [B, *space, 1] with `share_channels`.

    key, index: the draws of a sample follow its entry of index [B]. shape: (*space, channels). The others are as in `dropblock`.
    """
    *spread, channels = shape
    space = tuple(spread)
    places = tuple(n - min(block_size, n) + 1 for n in space) if border else space
    gamma = dropblock_gamma(space, rate=rate, block_size=block_size, border=border)
    drawn = (*places, 1 if share_channels else channels)
    starts = jax.vmap(lambda k: jax.random.bernoulli(k, gamma, drawn))(per_sample_keys(key, index))
    kept = dropblock_kept(starts, space, block_size=block_size, border=border).astype(gamma.dtype)
    share = jnp.mean(jnp.mean(kept.reshape(kept.shape[0], -1), axis=1))
    if axis_name is not None:
        share = jax.lax.pmean(share, axis_name)
    return kept / jnp.where(share > 0, share, 1)


@method(
    target="activation", direction=(), inference="prior", granularity="sample",
    cite="Ghiasi et al., NeurIPS 2018", off=dict(rate=0.0),
)  # fmt: skip
def dropblock(
    *,
    rate: ArrayLike = 0.1,
    block_size: int = 7,
    site: str = "last_stage",
    ramp: bool = True,
    border: bool = True,
    share_channels: bool = False,
) -> Perturbation:
    """DropBlock of the activation [B, H, W, channels] at `site`.

    Args:
      rate: 1 − keep, at the end of training.
      block_size: b, of an edge; on smaller maps the whole edge.
      ramp: whether the rate rises linearly from 0 over training; False: constant.
      border: whole blocks only, and γ corrected for it. False is the common variant: γ = rate/b², blocks anywhere, cut at the border.
      share_channels: whether all channels of a sample lose the same blocks; the paper finds own blocks better.

    Metrics: dropped, the share of the entries.
    """
    check_number("dropblock", low=0, high=0.999, rate=rate)
    check_number("dropblock", low=1, block_size=block_size)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        now = jnp.asarray(rate, context.dtype) * (jnp.asarray(context.progress, context.dtype) if ramp else 1)
        mask = dropblock_mask(
            context.key, flow.index, flow.value.shape[1:], rate=now, block_size=block_size, border=border,
            share_channels=share_channels, axis_name=context.axis_name,
        )  # fmt: skip
        dropped = jnp.mean((mask == 0).astype(jnp.float32))
        return flow._replace(value=flow.value * mask.astype(flow.value.dtype)), state, {"dropped": dropped}

    return Perturbation(site, lambda context: (), apply)
