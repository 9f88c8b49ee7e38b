r"""Random crops, flips, RandAugment and Cutout, on the device, inside the jitted step.

    images ──► crop ──► flip ──► RandAugment: N operations, each drawn from the 14 below ──► Cutout

Every sample draws from fold_in(key, its index), so that what happens to it depends neither on its place in the batch nor on the
number of devices. The operations, with m = M / 30 and a random sign wherever ± stands:

| operation | what it does |
| --- | --- |
| identity | nothing |
| autocontrast | stretches each channel to 0..255 |
| equalize | flattens each channel's histogram |
| rotate | by ±30°·m about the centre |
| solarize | inverts the levels from 256·(1 − m) on |
| color | moves by the factor 1 ± 0.9·m away from the grey image; nothing on one channel |
| posterize | keeps 8 − round(4·m) bits |
| contrast | moves by 1 ± 0.9·m away from the mean grey |
| brightness | multiplies by 1 ± 0.9·m |
| sharpness | moves by 1 ± 0.9·m away from the smoothed image |
| shear_x, shear_y | by ±0.3·m, the first row or column stays |
| translate_x, translate_y | by ±(150/331)·m of the edge, whole pixels |

Their definitions are PIL's (ImageOps, ImageEnhance, Image.transform with the nearest pixel), in which the papers' pipelines are
written, to a grey level. The ranges are AutoAugment's in the form in which M = 0 does as little as possible: the factors start at
1 and posterize at 8 bits; the first implementations start at 0.1 and 4. Autocontrast and equalize don't depend on M.
Whatever comes into the image from outside, in a warp or under Cutout, is `grey`: 0.5, as in RandAugment's own code. Cutout's own
code puts zero after the normalisation, the channel's mean: give `grey=` the means for that.

Sources: Cubuk, Zoph, Shlens, Le, "RandAugment", NeurIPS 2020. DeVries, Taylor, "Improved Regularization of Convolutional Neural
Networks with Cutout", 2017.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.checks import check_choice, check_number

OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_BLENDS = ("color", "contrast", "brightness", "sharpness")
_WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to the images of a batch: called as `augmentation(images, key, index)`; false if nothing does.

    >>> bool(Augmentation()), bool(Augmentation(pad=4, flip=True))
    (False, True)
    """

    pad: int = 0
    """Pixels on each side before the random crop; each of the (2·pad + 1)² crops is equally likely; 0: no crop."""
    fill: str = "zero"
    """What the padding holds: "zero" or "reflect"."""
    flip: bool = False
    """Whether images are mirrored left to right, with probability 1/2."""
    cutout: int = 0
    """Edge of Cutout's square; its centre is any pixel, the part outside the image is lost; 0: none."""
    randaugment: int = 0
    """RandAugment's N, operations per image; 0: none."""
    magnitude: float = 9.0
    """RandAugment's M, from 0 to 30."""
    grey: float | tuple[float, ...] = 0.5
    """What comes in from outside the image, in [0, 1]: one number or one per channel."""

    def __post_init__(self):
        for name in ("pad", "cutout", "randaugment"):
            if getattr(self, name) != int(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"Augmentation needs {name} >= 0, got {getattr(self, name)}. Write {name}=0 for none.")
        check_choice("Augmentation", "fill", self.fill, ("zero", "reflect"))
        check_number("Augmentation", low=0, high=30, magnitude=self.magnitude)
        check_number("Augmentation", low=0, high=1, grey=self.grey)
        levels = np.asarray(self.grey, np.float64).tolist()
        object.__setattr__(self, "grey", tuple(levels) if isinstance(levels, list) else levels)  # hashable

    def __bool__(self):
        return bool(self.pad or self.flip or self.cutout or self.randaugment)

    def __call__(self, images: jax.Array, key: jax.Array, index: jax.Array) -> jax.Array:
        """The augmented images [B, H, W, channels], of the same dtype.

        Zero is black, so augment before normalising, as the papers' pipelines do. Pass another key at each step
        (fold_in(key, step)): a sample draws the same from the same key.

        Args:
          images: [B, H, W, channels], uint8 or floating in [0, 1]; crops and flips take any dtype. key: one PRNG key.
          index: [B] integers, the samples' positions in the training set.
        """
        self._check(images, index)
        if not self:
            return images

        def one(image, i):
            key_i = jax.random.fold_in(key, i)
            crop_key, flip_key = jax.random.split(key_i)
            if self.pad:
                image = _crop(image, crop_key, self.pad, self.fill)
            if self.flip:
                image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
            if self.randaugment:
                image = self._randaugment(image, jax.random.fold_in(key_i, 2))
            if self.cutout:
                image = _cut(image, jax.random.fold_in(key_i, 3), self.cutout, _pixel(self.grey, image.dtype))
            return image

        return jax.vmap(one)(images, index)

    def _randaugment(self, image, key):
        start, reach = _ranges(self.magnitude, image.shape)
        for draw in jax.random.uniform(key, (self.randaugment, 2)):
            operation = jnp.floor(draw[0] * len(OPERATIONS)).astype(jnp.int32)
            argument = start[operation] + jnp.where(draw[1] < 0.5, -1.0, 1.0) * reach[operation]
            image = operate(image, operation, argument, self.grey)
        return image

    def _check(self, images, index):
        if images.ndim != 4 or index.shape != images.shape[:1]:
            raise ValueError(
                f"Augmentation needs images [B, H, W, channels] and index [B], got {images.shape} and {index.shape}. "
                "For one image, write images[None] and index[None]."
            )
        edge, channels = min(images.shape[1:3]), images.shape[3]
        if self.fill == "reflect" and self.pad >= edge:
            raise ValueError(f"Augmentation needs pad < {edge} to reflect these images, got {self.pad}. Write pad={edge // 8}.")
        if self.cutout > edge:
            raise ValueError(
                f"Augmentation needs cutout <= {edge}, the image's edge, got {self.cutout}. Write cutout={edge // 2}."
            )
        if not (self.cutout or self.randaugment):
            return
        if np.ndim(self.grey) and len(self.grey) != channels:
            raise ValueError(
                f"Augmentation needs one grey, or one for each of {channels} channels, got {self.grey}. Write grey=0.5."
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"Augmentation needs uint8 images or floating ones in [0, 1], got {images.dtype}. Cast them.")


def augment(images: jax.Array, key: jax.Array, index: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Random crops after zero padding, and horizontal flips: `Augmentation(pad=pad, flip=flip)(images, key, index)`."""
    return Augmentation(pad=pad, flip=flip)(images, key, index)


def operate(image: jax.Array, operation: jax.Array, argument: jax.Array, grey: float | tuple[float, ...] = 0.5) -> jax.Array:
    """One of OPERATIONS on an image [H, W, channels], uint8 or floating in [0, 1].

    Operation and argument may be traced, so that under `vmap` each image gets its own: the eight that change levels are a few
    formulas, the five that move pixels one gather, and selecting comes last.

    Args:
      operation: its place in OPERATIONS. argument: degrees, a level, bits, a factor, a slope or pixels, as in the table above
        with ± resolved; ignored by the first three. grey: of what comes in from outside.
    """
    at = lambda name: operation == OPERATIONS.index(name)
    among = lambda names: jnp.any(jnp.stack([at(name) for name in names]))
    whole = image.dtype == jnp.uint8
    cut = jnp.floor if whole else lambda x: x  # PIL cuts off what is behind the point; floating pixels keep it
    half = 0.5 if whole else 0.0  # and rounds what isn't the result yet
    levels = image.astype(jnp.float32) * (1.0 if whole else 255.0)
    levels = jnp.where(jnp.abs(levels - jnp.round(levels)) < 1e-3, jnp.round(levels), levels)  # 100 / 255 · 255 is 99.99999
    luma = _luma(levels, cut, half)
    target = jnp.where(at("color"), luma, jnp.where(at("contrast"), cut(luma.mean() + half), 0.0))
    target = jnp.where(at("sharpness"), _smooth(levels, cut, half), target)
    changed = cut(jnp.clip(target + argument * (levels - target), 0.0, 255.0))
    changed = jnp.where(at("solarize"), jnp.where(levels < argument, levels, 255.0 - levels), changed)
    step = jnp.left_shift(1, 8 - jnp.where(at("posterize"), argument, 8.0).astype(jnp.int32)).astype(jnp.float32)
    changed = jnp.where(at("posterize"), jnp.floor(levels / step) * step, changed)
    changed = jnp.where(at("autocontrast"), _autocontrast(levels, cut), changed)
    changed = jnp.where(at("equalize"), _equalize(levels), changed)
    changed = (changed if whole else changed / 255.0).astype(image.dtype)
    moved = _warp(image, _pixel(grey, image.dtype), *(jnp.where(at(name), argument, 0.0) for name in _WARPS))
    return jnp.where(at("identity"), image, jnp.where(among(_WARPS), moved, changed))


def _ranges(magnitude, shape):
    """The argument of each operation at this magnitude: (start [14], reach [14]), argument = start ± reach."""
    m = magnitude / 30
    far = lambda edge: float(int(150 / 331 * edge * m))
    reach = {
        "rotate": 30 * m,
        "shear_x": 0.3 * m,
        "shear_y": 0.3 * m,
        "translate_x": far(shape[1]),
        "translate_y": far(shape[0]),
    }
    reach |= dict.fromkeys(_BLENDS, 0.9 * m)
    start = {"solarize": 256 * (1 - m), "posterize": 8.0 - round(4 * m)} | dict.fromkeys(_BLENDS, 1.0)
    return tuple(jnp.array([table.get(name, 0.0) for name in OPERATIONS], jnp.float32) for table in (start, reach))


def _pixel(grey, dtype):
    """grey as a pixel, [channels] or [1]."""
    pixel = np.atleast_1d(np.asarray(grey, np.float32))
    return jnp.asarray(np.round(255 * pixel) if dtype == jnp.uint8 else pixel).astype(dtype)


def _crop(image, key, pad, fill):
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="constant" if fill == "zero" else "reflect")
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def _cut(image, key, size, pixel):
    """Cutout: a square of that size around any pixel."""
    height, width, _ = image.shape
    centre = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array([height, width], jnp.float32))
    inside = lambda place, first: (place >= first) & (place < first + size)
    first = centre.astype(jnp.int32) - size // 2
    rows, columns = inside(jnp.arange(height), first[0]), inside(jnp.arange(width), first[1])
    return jnp.where(rows[:, None, None] & columns[None, :, None], pixel[None, None], image)


def _luma(levels, cut, half):
    """[H, W, 1]: the grey image, by ITU-R 601-2 for three channels (PIL's integers), the mean for any other number."""
    if levels.shape[-1] != 3:
        return levels.mean(-1, keepdims=True)
    red, green, blue = (levels[..., c, None] for c in range(3))  # a sum over an axis of three is slow on CPU
    return cut((19595 * red + 38470 * green + 7471 * blue) / 65536 + half)  # exact for bytes


def _smooth(levels, cut, half):
    """The mean over 3 x 3 pixels, the middle one counted five times; the border stays."""
    rows = levels[:-2] + levels[1:-1] + levels[2:]
    middle = levels[1:-1, 1:-1]
    inner = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * middle) / 13
    return levels.at[1:-1, 1:-1].set(cut(inner + half))


def _autocontrast(levels, cut):
    low, high = levels.min((0, 1), keepdims=True), levels.max((0, 1), keepdims=True)
    stretched = (levels - low) * 255 / jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, cut(jnp.minimum(stretched + 1e-4, 255.0)) if cut is jnp.floor else stretched, levels)


def _equalize(levels):
    """Level v becomes (s // 2 + the number of pixels below v) // s, s = (pixels below the highest level) // 255; s = 0: as it is."""
    channels = levels.shape[-1]
    bins = jnp.clip(levels, 0, 255).astype(jnp.int32) + 256 * jnp.arange(channels)[None, None]
    count = jnp.zeros(256 * channels, jnp.int32).at[bins].add(1).reshape(channels, 256)
    below = jnp.cumsum(count, 1) - count
    step = jnp.max(jnp.where(count > 0, below, 0), 1, keepdims=True) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255).astype(jnp.float32)
    return jnp.where((step[:, 0] > 0)[None, None], table.reshape(-1)[bins], levels)


def _warp(image, pixel, degrees, shear_x, shear_y, right, down):
    """The image with, at (x, y), the pixel nearest to what the affine map takes from there; `pixel` where there is none."""
    height, width, channels = image.shape
    # Pixel centres lie at + 0.5; the rotation, counter-clockwise, is about the centre, the shears about the upper left corner.
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), -jnp.sin(jnp.deg2rad(degrees))
    x, y = jnp.arange(width)[None].astype(jnp.float32) + 0.5, jnp.arange(height)[:, None].astype(jnp.float32) + 0.5
    from_x = jnp.floor(cos * x + (sin + shear_x) * y + ((1 - cos) * width / 2 - sin * height / 2 + right)).astype(jnp.int32)
    from_y = jnp.floor((shear_y - sin) * x + cos * y + ((1 - cos) * height / 2 + sin * width / 2 + down)).astype(jnp.int32)
    known = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    place = jnp.clip(from_y, 0, height - 1) * width + jnp.clip(from_x, 0, width - 1)
    return jnp.where(known[..., None], image.reshape(-1, channels)[place], pixel[None, None])
