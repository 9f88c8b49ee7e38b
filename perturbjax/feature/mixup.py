r"""Mixup: convex combinations of pairs of inputs and of their labels.

    x̃_i = λ x_i + (1 − λ) x_j,   ỹ_i = λ y_i + (1 − λ) y_j,   λ ~ Beta(α, α) once per batch, j a permutation of the batch

As a perturbation of the feature: (1 − λ)(x_j − x_i). λ is replaced by max(λ, 1 − λ), which changes nothing in distribution (pairs
swap roles) and keeps `labels` the dominant class. Source: Zhang et al., "mixup", ICLR 2018.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def draw_mixing(key: jax.Array, batch_size: int, *, alpha: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """(λ in [1/2, 1], partner of each sample [B]); a batch mixes with a permutation of itself."""
    weight_key, pair_key = jax.random.split(key)
    weight = jax.random.beta(weight_key, alpha, alpha)
    return jnp.maximum(weight, 1 - weight), jax.random.permutation(pair_key, batch_size)


def mix(values: jax.Array, weight: ArrayLike, partner: jax.Array) -> jax.Array:
    """λ·values + (1 − λ)·values[partner], for floating values [B, ...], λ a number or [B], and partner [B] positions in the batch.

    >>> print(mix(jnp.array([0.0, 1.0]), 0.75, jnp.array([1, 0])))
    [0.25 0.75]
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"mix needs floating values, got {values.dtype}. Convert them first: values.astype(jnp.float32) / 255."
        )
    weight = jnp.asarray(weight, values.dtype)
    weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
    return weight * values + (1 - weight) * values[partner]


def mix_side(side: Mapping[str, jax.Array], weight: ArrayLike, partner: jax.Array) -> Mapping[str, jax.Array]:
    """Side information of the mixtures: a mask of words is true where either text has one; all else is that of the dominant sample."""
    if "mask" not in side:
        return side
    return {**side, "mask": side["mask"] | (side["mask"][partner] & (jnp.asarray(weight) < 1))}


@method(
    target=("feature", "label"), direction=(+1, -1), inference="prior", granularity="sample",
    cite="Zhang et al., ICLR 2018", off=None,
)  # fmt: skip
def mixup(*, alpha: ArrayLike = 1.0, site: str = "input") -> Perturbation:
    """Mixup with λ ~ Beta(α, α), α = `alpha`, at the input or at another `site`. Per-device code mixes within each device's batch."""
    check_number("mixup", low=0, open_low=True, alpha=alpha)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        weight, partner = draw_mixing(context.key, flow.labels.shape[0], alpha=alpha)
        return (
            flow._replace(
                value=mix(flow.value, weight, partner),
                targets=mix(flow.targets, weight, partner),
                side=mix_side(flow.side, weight, partner),
            ),
            state,
            {"weight": weight},
        )

    return Perturbation(site, lambda context: (), apply)
