r"""Random erasing: a box of the image, of random size, shape and place, is overwritten.

    area = s · H W,  s ~ U(s_low, s_high);   aspect r log-uniform in (r_low, r_high);   h = √(area · r),  w = √(area / r)

A box that doesn't fit is drawn again, at most `TRIES` times; then the image stays as it is. As a perturbation of the feature: fill − x
inside the box. Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, Algorithm 1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import wide
from perturbjax.feature.boxes import box_mask, require_images
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method

TRIES = 10


def erasing_box(
    key: jax.Array, height: int, width: int, *, smallest: ArrayLike = 0.02, largest: ArrayLike = 0.4, aspect: ArrayLike = 0.3
) -> jax.Array:
    """[height, width] bool, true in the box: the first of `TRIES` that fits; all false if none does.

    Args:
      key: of this image.
      height, width: of the image.
      smallest, largest: s_low and s_high, shares of the image's area.
      aspect: r_low, of height to width; r_high is 1/r_low.
    """
    size_key, shape_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(size_key, [TRIES], jnp.float32, minval=smallest, maxval=largest) * height * width
    span = -jnp.log(jnp.asarray(aspect, jnp.float32))
    ratio = jnp.exp(jax.random.uniform(shape_key, [TRIES], jnp.float32, minval=-1.0, maxval=1.0) * span)
    sides = jnp.round(jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=1))  # [TRIES, 2]
    image = jnp.array([height, width], jnp.float32)
    fits = jnp.all((sides < image[None]) & (sides >= 1), axis=1)
    first = jnp.argmax(fits)
    low = jnp.floor(jax.random.uniform(place_key, [2], jnp.float32) * (image - sides[first] + 1))
    return box_mask(low, low + sides[first], height, width) & fits.any()


@method(
    target="feature", direction=(), inference="prior", granularity="sample",
    cite="Zhong et al., AAAI 2020", off=dict(probability=0.0), alias="erasing",
)  # fmt: skip
def random_erasing(
    *,
    probability: ArrayLike = 0.5,
    smallest: ArrayLike = 0.02,
    largest: ArrayLike = 0.4,
    aspect: ArrayLike = 0.3,
    fill: Literal["random", "mean"] = "random",
) -> Perturbation:
    """Random erasing at the input, of images in [0, 1]; every draw belongs to the sample's position in the data set.

    Args:
      probability: how often an image is erased.
      smallest, largest: the box's share of the image, drawn uniformly between them.
      aspect: smallest height to width, at most 1; the largest is 1/aspect.
      fill: every pixel of the box drawn from U(0, 1), or the "mean" of the image, by channel (the paper: of the data set).

    Metrics: erased, the share of the pixels.
    """
    check_number("random_erasing", low=0, high=1, probability=probability, smallest=smallest, largest=largest)
    check_number("random_erasing", low=0, high=1, open_low=True, aspect=aspect)
    check_choice("random_erasing", "fill", fill, ("random", "mean"))

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        height, width = require_images("random_erasing", flow.value, context.site)

        def one(key: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            whether_key, box_key, fill_key = jax.random.split(key, 3)
            inside = erasing_box(box_key, height, width, smallest=smallest, largest=largest, aspect=aspect)
            inside &= jax.random.uniform(whether_key, dtype=jnp.float32) < probability
            if fill == "random":
                drawn = jax.random.uniform(fill_key, image.shape, wide(image).dtype)
            else:
                drawn = jnp.broadcast_to(wide(image).mean((0, 1), keepdims=True), image.shape)
            over = inside.reshape(inside.shape + (1,) * (image.ndim - 2))
            return jnp.where(over, drawn.astype(image.dtype), image), inside

        value, inside = jax.vmap(one)(per_sample_keys(context.key, flow.index), flow.value)
        return flow._replace(value=value), state, {"erased": inside.mean(dtype=jnp.float32)}

    return Perturbation("input", lambda context: (), apply)
