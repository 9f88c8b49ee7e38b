"""perturbjax.data.augment: crops, flips and Cutout pixel by pixel, each RandAugment operation against PIL's, draws sample by sample."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from perturbjax.data import Augmentation, augment
from perturbjax.data.augment import OPERATIONS, operate

SHAPE = (24, 5, 6, 3)
NOISE = jnp.asarray(np.random.default_rng(0).integers(1, 256, SHAPE), jnp.uint8)  # no zero: padding shows
STRONG = Augmentation(pad=2, flip=True, cutout=3, randaugment=2, magnitude=20.0)


@partial(jax.jit, static_argnums=0)
def call(augmentation, images, key, index):
    return augmentation(images, key, index)


def crop(images, key, index, *, pad, flip, fill="zero"):
    return call(Augmentation(pad=pad, flip=flip, fill=fill), images, key, index)


@pytest.fixture(params=["uint8", "bfloat16"])
def images(request):
    return NOISE.astype(request.param)


def crops(image, pad, flip, fill="zero"):
    """All crops of one image (and their mirror images), made with numpy."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="constant" if fill == "zero" else "reflect")
    height, width = image.shape[:2]
    out = [padded[y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    return out + [crop[:, ::-1] for crop in out] if flip else out


@pytest.mark.parametrize(
    ("pad", "flip", "fill"),
    [(2, True, "zero"), (2, False, "zero"), (2, True, "reflect"), (0, True, "zero"), (0, False, "zero")],
)
def test_each_image_becomes_one_of_its_crops(images, pad, flip, fill):
    out = crop(images, jax.random.key(0), jnp.arange(24), pad=pad, flip=flip, fill=fill)
    assert out.shape == images.shape and out.dtype == images.dtype
    chosen = []
    for got, image in zip(np.asarray(out), np.asarray(images), strict=True):
        same = [np.array_equal(got, crop) for crop in crops(image, pad, flip, fill)]
        assert sum(same) == 1
        chosen.append(same.index(True))
    assert len(set(chosen)) > 8 if pad else len(set(chosen)) == 1 + flip


def test_crops_and_flips_are_uniform():
    image = jnp.arange(1, 26, dtype=jnp.float32).reshape(1, 5, 5, 1)
    num, known = 9000, {np.asarray(crop).tobytes(): k for k, crop in enumerate(crops(np.asarray(image[0]), 1, True))}
    out = crop(jnp.broadcast_to(image, (num, 5, 5, 1)), jax.random.key(1), jnp.arange(num), pad=1, flip=True)
    counts = np.bincount([known[x.tobytes()] for x in np.asarray(out)], minlength=18)
    np.testing.assert_allclose(counts, num / 18, atol=5 * np.sqrt(num / 18))  # 5 standard deviations


def test_crop_and_flip_draw_what_they_always_drew():
    """Old runs can be repeated: the two keys of fold_in(key, index), and nothing else."""
    images, key, index = jnp.arange(3 * 4 * 4, dtype=jnp.uint8).reshape(3, 4, 4, 1), jax.random.key(5), jnp.array([7, 0, 2])

    @jax.jit
    @jax.vmap
    def draws(i):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, i))
        return jax.random.randint(crop_key, (2,), 0, 3), jax.random.bernoulli(flip_key)

    out = np.asarray(jax.jit(partial(augment, pad=1, flip=True))(images, key, index))
    for got, image, (top, left), flipped in zip(out, np.asarray(images), *map(np.asarray, draws(index))):
        wanted = np.pad(image, ((1, 1), (1, 1), (0, 0)))[top : top + 4, left : left + 4]
        np.testing.assert_array_equal(got, wanted[:, ::-1] if flipped else wanted)
    np.testing.assert_array_equal(out, crop(images, key, index, pad=1, flip=True))


def test_a_samples_draw_belongs_to_its_index_not_to_its_place():
    images, key, index = NOISE, jax.random.key(3), jnp.arange(24) * 7
    f = lambda x, i, key=key: call(STRONG, x, key, i)
    whole, order = f(images, index), np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(f(images[order], index[order]), whole[order])
    np.testing.assert_array_equal(jnp.concatenate([f(images[:12], index[:12]), f(images[12:], index[12:])]), whole)
    assert not np.array_equal(f(images, index, jax.random.key(4)), whole) and not np.array_equal(f(images, index + 1), whole)


def test_the_same_numbers_on_several_devices():
    devices = jax.devices()[: max(n for n in (1, 2, 4, 8) if n <= jax.device_count())]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "d"), jax.sharding.PartitionSpec("d"))
    f = lambda x, i: call(STRONG, x, jax.random.key(0), i)
    split = f(jax.device_put(NOISE, sharding), jax.device_put(jnp.arange(24), sharding))
    np.testing.assert_array_equal(split, f(NOISE, jnp.arange(24)))


def test_no_piece_changes_the_draws_of_another():
    images, key, index = jnp.full([16, 8, 8, 1], 200, jnp.uint8), jax.random.key(0), jnp.arange(16)
    holes = lambda **options: np.asarray(call(Augmentation(cutout=4, grey=0.0, **options), images, key, index)) == 0
    np.testing.assert_array_equal(holes(), holes(flip=True))
    assert (holes() <= holes(pad=1)).all()  # black borders come on top


def test_cutout_blanks_a_square_around_any_pixel():
    num, size, height, width = 4000, 4, 6, 5
    images = jnp.full([num, height, width, 2], 0.25, jnp.float32)
    out = np.asarray(call(Augmentation(cutout=size, grey=(0.5, 1.0)), images, jax.random.key(0), jnp.arange(num)))
    places = {}
    for y in range(height):
        for x in range(width):
            image = np.full((height, width, 2), 0.25, np.float32)
            image[max(y - 2, 0) : y + 2, max(x - 2, 0) : x + 2] = [0.5, 1.0]
            places.setdefault(image.tobytes(), []).append((y, x))
    counts = dict.fromkeys(places, 0)
    for image in out:
        counts[image.tobytes()] += 1  # any other image is a KeyError
    share = num / (height * width)
    for image, centres in places.items():
        assert abs(counts[image] - share * len(centres)) < 5 * np.sqrt(share * len(centres))


def test_cutout_has_the_size_it_is_given_even_if_odd():
    out = call(Augmentation(cutout=3), jnp.zeros([50, 9, 9, 1], jnp.uint8), jax.random.key(0), jnp.arange(50))
    assert (np.asarray(out) == 128).sum((1, 2, 3)).max() == 9


def photographs(channels, count=4, height=20, width=32):
    """Noise, a slope, blobs and a dark image: uint8 [4, H, W, channels]."""
    random = np.random.default_rng(1)
    slope = np.add.outer(np.linspace(30, 150, height), np.linspace(0, 90, width))[..., None] * random.uniform(0.5, 1, channels)
    blobs = random.uniform(0, 255, (height // 4, width // 4, channels)).repeat(4, 0).repeat(4, 1)
    noise = random.uniform(0, 255, (height, width, channels))
    return np.stack([noise, slope, blobs, 20 + noise / 5]).astype(np.uint8)


def enhanced(kind):
    return lambda image, factor: kind(image).enhance(factor)


def moved(*matrix):
    """Image.transform with grey outside; `matrix` maps the argument to its six numbers."""
    return lambda image, value: image.transform(
        image.size, Image.Transform.AFFINE, [entry(value) if callable(entry) else entry for entry in matrix],
        fillcolor=128 if image.mode == "L" else (128,) * 3,
    )  # fmt: skip


itself = lambda value: value
PIL = {  # the operation by PIL, arguments to try
    "identity": (lambda image, _: image, (0,)),
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), (0,)),
    "equalize": (lambda image, _: ImageOps.equalize(image), (0,)),
    "rotate": (lambda image, angle: image.rotate(angle, fillcolor=128 if image.mode == "L" else (128,) * 3), (-30, -9, 17.3)),
    "solarize": (lambda image, threshold: ImageOps.solarize(image, threshold), (256, 179.2, 0)),
    "color": (enhanced(ImageEnhance.Color), (0.1, 0.73, 1.9)),
    "posterize": (lambda image, bits: ImageOps.posterize(image, bits), (8, 7, 4)),
    "contrast": (enhanced(ImageEnhance.Contrast), (0.1, 0.73, 1.9)),
    "brightness": (enhanced(ImageEnhance.Brightness), (0.1, 0.73, 1.9)),
    "sharpness": (enhanced(ImageEnhance.Sharpness), (0.1, 0.73, 1.9)),
    "shear_x": (moved(1, itself, 0, 0, 1, 0), (-0.3, 0.11)),
    "shear_y": (moved(1, 0, 0, itself, 1, 0), (-0.3, 0.11)),
    "translate_x": (moved(1, 0, itself, 0, 1, 0), (-9, 4)),
    "translate_y": (moved(1, 0, 0, 0, 1, itself), (-9, 4)),
}
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@jax.jit
def operated(images, operation, argument):
    return jax.vmap(lambda image: operate(image, operation, argument))(images)


def by_pil(name, images, argument):
    wrap = lambda image: Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.stack([np.asarray(PIL[name][0](wrap(image), argument)).reshape(image.shape) for image in images])


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_pil(name, dtype, channels):
    images = photographs(channels)
    given = jnp.asarray(images if dtype == "uint8" else (images / 255).astype(np.float32))
    for argument in PIL[name][1]:
        out = operated(given, jnp.int32(OPERATIONS.index(name)), jnp.float32(argument))
        assert out.dtype == given.dtype
        out, wanted = np.asarray(out, np.float64), by_pil(name, images, argument).astype(np.float64)
        distance = np.abs(out * (1 if dtype == "uint8" else 255) - wanted)
        if name in MOVES:  # which pixel is nearest may be decided by the last bit
            assert (distance > 0.51).mean() < 0.005, f"{name}({argument})"
        else:  # floating pixels are cut off less often: luma, mean and result
            assert distance.max() <= (1 if dtype == "uint8" else 2), f"{name}({argument})"


def test_identity_is_exact_and_on_one_channel_color_too():
    pixels = jnp.asarray(np.random.default_rng(0).random((2, 6, 6, 1)), jnp.float32)
    for images in (pixels, jnp.asarray(photographs(3))):
        np.testing.assert_array_equal(operated(images, jnp.int32(0), jnp.float32(0)), images)
    color = operated(jnp.asarray(photographs(1)), jnp.int32(OPERATIONS.index("color")), jnp.float32(0.1))
    np.testing.assert_array_equal(color, photographs(1))


def variants(image, arguments):
    """{name, or (name, sign) where there are two: the operation's result}"""
    return {
        (name, i): operated(image, jnp.int32(OPERATIONS.index(name)), jnp.float32(argument))
        for name in OPERATIONS
        for i, argument in enumerate(arguments.get(name, (0,)))
    }


def test_operations_and_signs_are_drawn_uniformly_with_the_arguments_of_the_table():
    m, (_, height, width, _) = 12 / 30, photographs(3).shape
    either = lambda start, reach: (start - reach, start + reach)
    arguments = {
        "rotate": either(0, 30 * m), "solarize": (256 * (1 - m),), "posterize": (8 - 2,), "shear_x": either(0, 0.3 * m),
        "shear_y": either(0, 0.3 * m), "translate_x": either(0, int(150 / 331 * width * m)),
        "translate_y": either(0, int(150 / 331 * height * m)),
        **{name: either(1, 0.9 * m) for name in ("color", "contrast", "brightness", "sharpness")},
    }  # fmt: skip
    image = jnp.asarray((20 + 0.7 * photographs(3)[:1]).astype(np.uint8))  # no two variants agree on it
    one = variants(image, arguments)
    count = {np.asarray(result).tobytes(): 0 for result in one.values()}
    assert len(count) == len(one) == 14 + 9
    num = 4200
    draw = lambda n, num: call(
        Augmentation(randaugment=n, magnitude=12.0), image.repeat(num, 0), jax.random.key(0), jnp.arange(num)
    )
    for got in np.asarray(draw(1, num)):
        count[got.tobytes()] += 1  # any other image is a KeyError
    for (name, _), result in one.items():
        share = num / 14 / len(arguments.get(name, (0,)))
        assert abs(count[np.asarray(result).tobytes()] - share) < 5 * np.sqrt(share), name  # 5 standard deviations
    two = {np.asarray(result).tobytes() for first in one.values() for result in variants(first, arguments).values()}
    assert {got.tobytes() for got in np.asarray(draw(2, 200))} <= two


def test_magnitude_zero_leaves_the_image_except_for_the_two_without_magnitude():
    image = jnp.asarray(photographs(3)[3:4])
    out = call(Augmentation(randaugment=1, magnitude=0.0), image.repeat(300, 0), jax.random.key(0), jnp.arange(300))
    kinds = {np.asarray(x).tobytes() for x in out}
    assert kinds == {
        np.asarray(x[0]).tobytes() for x in [image, *(operated(image, jnp.int32(k), jnp.float32(0)) for k in (1, 2))]
    }


def test_nothing_to_do_is_false_and_returns_the_images(images):
    for nothing in (Augmentation(), Augmentation(fill="reflect", magnitude=3.0, grey=(0.1, 0.2, 0.3))):
        assert not nothing and nothing(images, jax.random.key(0), jnp.arange(24)) is images
    for option in (dict(pad=1), dict(flip=True), dict(cutout=1), dict(randaugment=1)):
        assert Augmentation(**option)


def test_an_augmentation_is_a_static_argument():
    a, b = (Augmentation(pad=4, grey=grey) for grey in ([0.4, 0.5, 0.6], np.array([0.4, 0.5, 0.6])))
    assert a == b and hash(a) == hash(b) and hash(a) != hash(Augmentation(pad=4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.pad = 3


SOME = jnp.zeros([4, 8, 8, 3], jnp.uint8)
ERRORS = {
    "one image": (lambda: call_on(SOME[0], pad=2), "got (8, 8, 3) and (4,). For one image, write images[None]"),
    "index": (lambda: call_on(SOME[:3], pad=2), "got (3, 8, 8, 3) and (4,)"),
    "pad": (lambda: Augmentation(pad=-1), "pad >= 0, got -1. Write pad=0"),
    "fraction": (lambda: Augmentation(cutout=0.5), "cutout >= 0, got 0.5"),
    "fill": (lambda: Augmentation(fill="reflekt"), "got 'reflekt'. Did you mean 'reflect'?"),
    "magnitude": (lambda: Augmentation(magnitude=31), "0 <= magnitude <= 30, got 31"),
    "grey": (lambda: Augmentation(grey=128), "0 <= grey <= 1, got 128"),
    "greys": (lambda: call_on(SOME, cutout=2, grey=(0.5, 0.5)), "each of 3 channels, got (0.5, 0.5). Write grey=0.5"),
    "reflection": (lambda: call_on(SOME, pad=8, fill="reflect"), "pad < 8 to reflect these images, got 8. Write pad=1"),
    "cutout": (lambda: call_on(SOME, cutout=16), "cutout <= 8, the image's edge, got 16. Write cutout=4"),
    "dtype": (lambda: call_on(SOME.astype(jnp.int32), randaugment=1), "got int32"),
}


def call_on(images, **options):
    return Augmentation(**options)(images, jax.random.key(0), jnp.arange(4))


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_given_and_what_to_write(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
