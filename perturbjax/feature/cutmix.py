r"""CutMix: a box of another image is pasted in, and the label is mixed by the area that remains.

    x̃_i = M ⊙ x_i + (1 − M) ⊙ x_j,   ỹ_i = λ̃ y_i + (1 − λ̃) y_j,   λ̃ = mean of M = 1 − area of the box / area of the image

M is 0 in a box with sides √(1 − λ) times the image's, λ ~ Beta(α, α), around a uniform point, cut off at the border. If the box is
more than half of the image, M is 1 inside it and 0 outside, which over a batch gives the same mixtures in another order: each then is
mostly the sample whose label, position in the data set and domain go with it.
As a perturbation of the feature: (1 − M) ⊙ (x_j − x_i). Source: Yun et al., "CutMix", ICCV 2019.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.feature.boxes import box_mask, require_images
from perturbjax.feature.mixup import mix
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method


def cutmix_boxes(
    keys: jax.Array, height: int, width: int, *, alpha: ArrayLike = 1.0, probability: ArrayLike = 1.0
) -> jax.Array:
    """One mask per key, [K, height, width] bool, true inside the box; with 1 − `probability` there is no box."""

    def one(key: jax.Array) -> jax.Array:
        weight_key, row_key, column_key, whether_key = jax.random.split(key, 4)
        side = jnp.sqrt(1 - jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32))
        half = (
            jnp.floor(side * jnp.array([height, width], jnp.float32)).astype(jnp.int32) // 2
        )  # whole pixels, as the authors' code
        middle = jnp.stack(
            [jax.random.randint(row_key, [], 0, height, jnp.int32), jax.random.randint(column_key, [], 0, width, jnp.int32)]
        )
        box = box_mask(middle - half, middle + half, height, width)
        return box & (jax.random.uniform(whether_key, dtype=jnp.float32) < probability)

    return jax.vmap(one)(keys)


@method(
    target=("feature", "label"), direction=(+1, -1), inference="prior", granularity="sample",
    cite="Yun et al., ICCV 2019", off=dict(probability=0.0),
)  # fmt: skip
def cutmix(
    *, alpha: ArrayLike = 1.0, probability: ArrayLike = 0.5, boxes: Literal["batch", "sample"] = "batch"
) -> Perturbation:
    """CutMix at the input, of images. Per-device code mixes within each device's batch.

    Args:
      alpha: of λ ~ Beta(alpha, alpha).
      probability: how often a batch (or a sample) is mixed; 0.5 on CIFAR.
      boxes: one box for the whole "batch" (the paper), or one for each "sample", drawn by its position in the data set.

    Metrics: weight, the mean of λ̃.
    """
    check_number("cutmix", low=0, open_low=True, alpha=alpha)
    check_number("cutmix", low=0, high=1, probability=probability)
    check_choice("cutmix", "boxes", boxes, ("batch", "sample"))

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        height, width = require_images("cutmix", flow.value, context.site)
        pair_key, box_key = jax.random.split(context.key)
        partner = jax.random.permutation(pair_key, flow.labels.shape[0])
        keys = per_sample_keys(box_key, flow.index) if boxes == "sample" else box_key[None]
        inside = cutmix_boxes(keys, height, width, alpha=alpha, probability=probability)
        share = jnp.mean(inside.astype(flow.targets.dtype), axis=(1, 2))  # of the box: [B] or [1]
        # The larger part is a sample's own: where the box is, it gets the box. Its label, index and side then say what it mostly is.
        theirs = inside ^ (share > 0.5)[:, None, None]
        weight = jnp.maximum(share, 1 - share)
        theirs = theirs.reshape(theirs.shape + (1,) * (flow.value.ndim - 3))
        return (
            flow._replace(value=jnp.where(theirs, flow.value[partner], flow.value), targets=mix(flow.targets, weight, partner)),
            state,
            {"weight": weight.mean()},
        )

    return Perturbation("input", lambda context: (), apply)
