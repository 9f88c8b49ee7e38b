"""One image file to pixels of the form that its set has: grey or colour, 8 bits or more, on a background where it is transparent."""

import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from perturbjax.data.images import resize
from perturbjax.data.opacity import UNTOUCHED, colour, on_background

GREY = ("1", "L", "LA", "La")  # Pillow's modes, of 8 bits a channel
SEE_THROUGH = ("LA", "La", "PA", "RGBA", "RGBa")


class Form(NamedTuple):
    """What all images of a set become."""

    image_size: int | None = None
    background: str = "white"
    grey: bool = True  # one channel, not three
    deep: bool = False  # float32 in [0, 1], not uint8


class Decoded(NamedTuple):
    """An image, and what is to be said of it: "transparent", "deep" (16 bits), "cut" (16 bits, of which Pillow reads 8)."""

    pixels: np.ndarray  # [H, W, 1 or 3], uint8 or float32 in [0, 1]
    traits: tuple[str, ...] = ()


class Damaged(NamedTuple):
    """A file that can't be decoded."""

    reason: str


class Wider(Exception):
    """An image that the form has no room for; `form` has."""

    def __init__(self, form: Form):
        super().__init__()
        self.form = form


def decode(path: pathlib.Path, form: Form) -> Decoded | Damaged:
    """The file's image, upright, the first frame of several. Raises Wider for colour among grey, or 16 bits among 8."""
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode[0] in "IF" and not deep:
                mode = image.mode
            else:
                return _deep(image, form) if deep else _usual(image, form)
    except Wider:
        raise
    except Exception as error:  # a damaged file: Pillow's decoders raise whatever they stumble over
        return Damaged(f"{type(error).__name__}: {error}")
    raise ValueError(
        f"load needs images of 8 or 16 bits, got {str(path)!r} of Pillow's mode {mode}, whose values have no known range. "
        "Scale them to 0..255 and save it again, as mode L."
    )


def _usual(image: Image.Image, form: Form) -> Decoded:
    """Of 8 bits a channel, or as many as Pillow reads."""
    if form.grey and image.mode not in GREY:
        raise Wider(form._replace(grey=False))
    traits = ["cut"] if any(";16" in str(tile) for tile in getattr(image, "tile", ())) else []
    image = ImageOps.exif_transpose(image)
    see_through = image.mode in SEE_THROUGH or "transparency" in image.info
    if see_through:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # of palettes too, or else Pillow warns
        rgba = np.asarray(image)
        if form.background != UNTOUCHED and (rgba[..., 3] < 255).any():
            _check_grey(form)
            image = Image.fromarray(on_background(rgba[None], form.background)[0])
            traits.append("transparent")
    image = image.convert("L" if form.grey else "RGB")
    pixels = np.asarray(image if form.image_size is None else resize(image, form.image_size))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return Decoded((pixels / np.float32(255)) if form.deep else pixels, tuple(traits))


def _deep(image: Image.Image, form: Form) -> Decoded:
    """Grey of 16 bits: 0..65535 becomes 0..1."""
    if not form.deep:
        raise Wider(form._replace(deep=True))
    traits, hole = ["deep"], image.info.get("transparency")  # PNG may name one value that is none
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.float32)
    grey = values / np.float32(65535)
    if isinstance(hole, int) and form.background != UNTOUCHED and (values == hole).any():
        _check_grey(form)
        behind = np.asarray(colour(form.background), np.float32) / 255
        pixels = np.where((values == hole)[..., None], behind[:1] if form.grey else behind, grey[..., None])
        traits.append("transparent")
    else:
        pixels = grey[..., None].repeat(1 if form.grey else 3, -1)
    if form.image_size is not None:
        channels = [np.asarray(resize(Image.fromarray(pixels[..., c]), form.image_size)) for c in range(pixels.shape[-1])]
        pixels = np.clip(np.stack(channels, -1), 0, 1)
    return Decoded(pixels, tuple(traits))


def _check_grey(form: Form) -> None:
    """Raises Wider for a background that grey images can't have."""
    if form.grey and len(set(colour(form.background))) > 1:
        raise Wider(form._replace(grey=False))
