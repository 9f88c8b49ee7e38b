"""Images that can be seen through, laid on a background: what is trained on is what a viewer shows."""

import dataclasses

import numpy as np
from PIL import ImageColor

from perturbjax.data.agreement import renewed
from perturbjax.data.dataset import FOUR, Dataset, in_blocks

UNTOUCHED = "none"  # in place of a colour


def on_background(images: np.ndarray, background: str = "white") -> np.ndarray:
    """[N, H, W, 3]: RGBA images on a background of one colour, in the dtype of images; uint8 is rounded, opaque pixels stay exact.

        out = a · rgb + (1 − a) · background

    Args:
      images: [N, H, W, 4], uint8 or floats in [0, 1]; the fourth channel is a, 0 where an image is transparent.
      background: a colour's name or #rrggbb, as Pillow reads them.

    Raises:
      ValueError: other shapes, an unknown colour.

    >>> on_background(np.array([0, 0, 0, 51], np.uint8).reshape(1, 1, 1, 4)).ravel()
    array([204, 204, 204], dtype=uint8)
    """
    if images.ndim != 4 or images.shape[-1] != 4:
        raise ValueError(
            f"on_background needs images [N, H, W, 4] (RGBA), got shape {list(images.shape)}. Leave it out for images without opacity."
        )
    out = np.empty((*images.shape[:-1], 3), images.dtype)
    full = 255 if images.dtype == np.uint8 else 1
    behind = np.array(colour(background), np.float64) * full / 255
    for block in in_blocks(images):
        pixels = images[block].astype(np.float64)
        seen, opacity = pixels[..., :3], pixels[..., 3:] / full
        mixed = opacity * seen + (1 - opacity) * behind
        out[block] = np.rint(mixed) if full == 255 else mixed
    return out


def colour(background: str) -> tuple[int, int, int]:
    """Red, green and blue in 0..255. ValueError for a name that is none."""
    try:
        return ImageColor.getrgb(background)[:3]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"load needs a background that is a colour, or none, got {background!r}. Write background='white', or '#ffffff'."
        ) from None


def laid(dataset: Dataset, background: str) -> Dataset:
    """A checked data set whose images of four channels lie on the background, with a note; untouched for "none" and other images."""
    if dataset.tokenizer is not None or dataset.image_shape[-1] != 4 or background == UNTOUCHED:
        return dataset
    images = dataset.images
    full = 255 if dataset.train_images.dtype == np.uint8 else 1
    if not any(x[block, ..., 3].any() for x in images.values() for block in in_blocks(x)):
        raise ValueError(
            f"load needs opacity in the fourth channel of {dataset.name}, got 0 everywhere, of which a white page would be left. "
            "Write images[..., :3], or --background none (load(..., background='none')) to train on all four."
        )
    transparent = sum(int((x[block, ..., 3] < full).any((1, 2)).sum()) for x in images.values() for block in in_blocks(x))
    total = sum(map(len, images.values()))
    note = (
        f"{dataset.name}: four channels are taken as RGBA: {transparent} of {total} images are transparent somewhere, and laid on "
        f"{background}. If the fourth is something else, write --background none (load(..., background='none')) to train on all four."
    )
    laid_on = {key: on_background(x, background) for key, x in images.items()}
    return dataclasses.replace(dataset, notes=renewed(dataset.notes, f"{dataset.name}: {FOUR}", note), **laid_on)
