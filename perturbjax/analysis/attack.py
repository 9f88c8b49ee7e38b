r"""Accuracy under attack: how often a trained net is right when somebody moves the test images against it, within a ball.

    PGD         x + δ_i,  δ_i = argmax_{‖δ‖ ≤ ε} ℓ(x_i + δ)              a delta for each image, by k projected steps
    universal   x + δ,    δ = argmax_{‖δ‖ ≤ ε} Σ_i ℓ(x_i + δ)            one delta for all, found on the training images
    by class    x + δ_y,  as universal, one for each class

Images are pixels in [0, 1] and stay there. A sample counts as right if the net is right on it both as it is and attacked: whoever
attacks may leave it alone. Steps and batches are Python loops over one compiled step, so that no gradient of a convolution stands
in a loop and one program serves every number of steps, bound and batch.
Sources: Madry et al., ICLR 2018 (PGD); Moosavi-Dezfooli et al., CVPR 2017 (universal); Shafahi et al., AAAI 2020 (by sign steps);
Benz et al., ICME 2021 (by class); taxonomy eqs. 31, 45–46 and Table 19.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax import spec
from perturbjax.checks import check_labels, check_number
from perturbjax.classes import own_entries
from perturbjax.data import epoch_order, evaluation_batches
from perturbjax.feature.adversarial import check_ball, group_ascent, random_start, shifted
from perturbjax.inference.pgd import pgd
from perturbjax.label_form import trouble
from perturbjax.projection import Norm

BATCH = 250
RANGE = (0.0, 1.0)
STEP = {"linf": "sign", "l2": "unit", "l1": "unit"}
"""The usual step of each ball."""
Logits = Callable[[jax.Array], jax.Array]


def attacked_accuracy(
    logits_of: Logits,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    bound: float = 8 / 255,
    step_size: float | None = None,
    num_steps: int = 20,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = BATCH,
) -> float:
    """Share of the images that are classified correctly as they are and under PGD with `num_steps` steps from a random start.

    Args:
      logits_of: images [B, ...] float32 in [0, 1] -> logits [B, C], in evaluation mode; or a `Teacher` (load_teacher(folder)), whose
        compiled program serves every net of its kind.
      images: [N, ...], float in [0, 1] or uint8. labels: [N].
      bound: ε, in pixels of [0, 1].
      step_size: α; None: ε/4, which is 2/255 for 8/255.
      num_steps: k.
      norm: "linf" (sign steps), "l2" or "l1" ball (steps of unit length).
      seed: of the random starts, which are drawn by each image's position.
      batch_size: images at once.

    Raises ValueError for a bound or images in other units, labels that don't fit, an unknown norm.

    >>> net = lambda x: jnp.concatenate([x, 1 - x], axis=1)  # class 0 if the pixel is bright
    >>> attacked_accuracy(net, np.array([[0.9], [0.6], [0.1]]), np.array([0, 0, 1]), bound=0.2)
    0.6666666666666666
    """
    images, labels = _checked("attacked_accuracy", images, labels, norm, bound=bound, step_size=step_size)
    check_number("attacked_accuracy", low=1, num_steps=num_steps)
    net, size = _net(logits_of), _sizes(bound, step_size)
    right = 0.0
    for batch in _in_order(images, labels, batch_size):
        clean = _right(net, batch.images, batch.labels)
        delta = _start(jax.random.key(seed), batch.index, batch.images, size.bound, norm)
        for _ in range(num_steps):
            delta = _pgd_step(net, batch.images, batch.labels, delta, size, norm)
        right += float((clean * _right(net, batch.images + delta, batch.labels) * batch.weights).sum())
    return right / len(labels)


def clean_accuracy(logits_of: Logits, images: np.ndarray, labels: np.ndarray, *, batch_size: int = BATCH) -> float:
    """Share of the images that are classified correctly as they are."""
    images, labels = _checked("clean_accuracy", images, labels, "linf")
    net = _net(logits_of)
    hits = (_right(net, batch.images, batch.labels) * batch.weights for batch in _in_order(images, labels, batch_size))
    return float(sum(float(hit.sum()) for hit in hits)) / len(labels)


def universal_delta(
    logits_of: Logits,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    bound: float = 8 / 255,
    step_size: float | None = None,
    epochs: int = 5,
    norm: Norm = "linf",
    clip_loss: float = 9.0,
    groups: np.ndarray | None = None,
    num_groups: int = 1,
    seed: int = 0,
    batch_size: int = BATCH,
) -> np.ndarray:
    """The delta [G, ...] that raises the losses of all these images (of each group of them) most, by sign steps over batches.

    Args:
      logits_of, images, labels, bound, norm, batch_size: as in `attacked_accuracy`; the images are training images.
      step_size: α; None: ε/4.
      epochs: passes over the images, in batches drawn with `seed`.
      clip_loss: β: images whose loss is above it do not pull.
      groups: [N] integers in 0..G-1, who shares a delta; None: all.
      num_groups: G.
    """
    images, labels = _checked("universal_delta", images, labels, norm, bound=bound, step_size=step_size)
    check_number("universal_delta", low=1, epochs=epochs, num_groups=num_groups)
    check_number("universal_delta", low=0, open_low=True, infinite=True, clip_loss=clip_loss)
    groups = np.zeros(len(labels), np.int32) if groups is None else np.asarray(groups, np.int32)
    check_labels("universal_delta", groups, num_groups)
    net, size = _net(logits_of), _sizes(bound, step_size)
    delta = jnp.zeros((num_groups, *images.shape[1:]), jnp.float32)
    for epoch in range(epochs):
        for rows in epoch_order(len(labels), min(batch_size, len(labels)), seed, epoch):
            batch = _pixels(images[rows]), jnp.asarray(labels[rows]), jnp.asarray(groups[rows])
            delta = _universal_step(net, *batch, delta, size, jnp.float32(clip_loss), norm)
    return np.asarray(delta)


def universal_accuracy(
    logits_of: Logits,
    images: np.ndarray,
    labels: np.ndarray,
    delta: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    batch_size: int = BATCH,
) -> float:
    """Share of the images that are classified correctly as they are and with the delta [G, ...] of their group added.

    Args:
      logits_of, images, labels, batch_size: as in `attacked_accuracy`; the images are test images.
      delta: [G, ...], as `universal_delta` gives it.
      groups: [N] integers in 0..G-1; None: all have the first delta.
    """
    images, labels = _checked("universal_accuracy", images, labels, "linf")
    groups = np.zeros(len(labels), np.int32) if groups is None else np.asarray(groups, np.int32)
    check_labels("universal_accuracy", groups, len(delta))
    if np.shape(delta)[1:] != images.shape[1:]:
        raise ValueError(
            f"universal_accuracy needs delta [G, ...] for images {images.shape[1:]}, got {np.shape(delta)}. "
            "Pass what universal_delta returned."
        )
    net, shared, right = _net(logits_of), jnp.asarray(delta, jnp.float32), 0.0
    for batch in _in_order(images, labels, batch_size):
        moved = shifted(batch.images, shared, jnp.asarray(groups[batch.index]), value_range=RANGE)
        hits = _right(net, batch.images, batch.labels) * _right(net, moved, batch.labels)
        right += float((hits * batch.weights).sum())
    return right / len(labels)


# Attacks by name, for the command line --------------------------------------------------------------------------------


class AttackData(NamedTuple):
    """What an attack is given: training images to learn from, test images to attack."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


@dataclasses.dataclass(frozen=True)
class PGD:
    """A delta for each test image: `attacked_accuracy`."""

    bound: float = 8 / 255
    num_steps: int = 20
    step_size: float | None = None
    norm: Norm = "linf"

    def __post_init__(self):
        check_ball("pgd", other="", norm=self.norm, bound=self.bound, step_size=self.step_size)
        check_number("pgd", low=1, num_steps=self.num_steps)

    def accuracy(self, logits_of: Logits, data: AttackData, seed: int = 0) -> float:
        """Of the test images under this attack."""
        return attacked_accuracy(logits_of, data.test_images, data.test_labels, seed=seed, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Universal:
    """One delta for all test images, found on the training images."""

    bound: float = 8 / 255
    epochs: int = 5
    step_size: float | None = None
    norm: Norm = "linf"

    name = "universal"

    def __post_init__(self):
        check_ball(self.name, other="", norm=self.norm, bound=self.bound, step_size=self.step_size)
        check_number(self.name, low=1, epochs=self.epochs)

    def accuracy(self, logits_of: Logits, data: AttackData, seed: int = 0) -> float:
        """Of the test images under this attack."""
        number = data.num_classes if self.by_class else 1
        train, test = (data.train_labels, data.test_labels) if self.by_class else (None, None)
        delta = universal_delta(
            logits_of,
            data.train_images,
            data.train_labels,
            groups=train,
            num_groups=number,
            seed=seed,
            **dataclasses.asdict(self),
        )
        return universal_accuracy(logits_of, data.test_images, data.test_labels, delta, groups=test)

    @property
    def by_class(self) -> bool:
        """Whether every class has a delta of its own."""
        return False


@dataclasses.dataclass(frozen=True)
class ClassUniversal(Universal):
    """One delta for each class of the test images, found on the training images."""

    name = "class_universal"

    @property
    def by_class(self) -> bool:
        """Whether every class has a delta of its own."""
        return True


ATTACKS: Mapping[str, Any] = {"pgd": PGD, "universal": Universal, "class_universal": ClassUniversal}


def parse_attacks(text: str) -> dict[str, PGD | Universal]:
    """Attacks as typed, "pgd(bound=8/255), universal", by that text. Raises ValueError with the nearest valid name or setting."""
    found = {}
    for typed, chain in spec.parse_list(text) if text.strip() not in ("", "none") else ():
        if len(chain) > 1:
            raise ValueError(f"--attack needs attacks separated by commas, got {typed!r}. Write {typed.replace('+', ', ')}.")
        if typed in found:
            raise ValueError(f"--attack needs every attack once, got {typed!r} twice. Remove one of them.")
        [call] = spec.resolve(chain, ATTACKS)
        found[typed] = ATTACKS[call.name](**dict(call.kwargs))
    return found


# One batch at a time --------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    images: jax.Array  # [B, ...] float32
    labels: jax.Array  # [B] int32
    index: np.ndarray  # [B] int32, positions in the set
    weights: jax.Array  # [B] float32, 0 for what fills up the last batch


class _Sizes(NamedTuple):
    bound: jax.Array  # [] float32
    step_size: jax.Array  # [] float32


def _sizes(bound: float, step_size: float | None) -> _Sizes:
    return _Sizes(jnp.float32(bound), jnp.float32(bound / 4 if step_size is None else step_size))


def _in_order(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[_Batch]:
    check_number("batch_size", low=1, batch_size=batch_size)
    for rows, weights in zip(*evaluation_batches(len(labels), min(batch_size, len(labels))), strict=True):
        yield _Batch(_pixels(images[rows]), jnp.asarray(labels[rows]), rows, jnp.asarray(weights))


def _pixels(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images, jnp.float32)


def _net(logits_of: Any) -> jax.tree_util.Partial:
    """A net whose variables are arguments of the compiled step, if it says what they are."""
    if hasattr(logits_of, "apply") and hasattr(logits_of, "variables"):  # a Teacher
        return jax.tree_util.Partial(logits_of.apply, jax.tree.map(jnp.asarray, logits_of.variables))
    return logits_of if isinstance(logits_of, jax.tree_util.Partial) else jax.tree_util.Partial(logits_of)


def _losses(net: Logits, images: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(net(images).astype(jnp.float32))
    return -own_entries(log_p, labels)


@jax.jit
def _right(net: Logits, images: jax.Array, labels: jax.Array) -> jax.Array:
    """[B] float32, 1 where the largest logit is the label's."""
    return (jnp.argmax(net(images), axis=-1) == labels).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="norm")
def _start(key, index, images, bound, norm):
    delta = random_start(key, index, images.shape[1:], bound=bound, norm=norm).astype(images.dtype)
    return jnp.clip(images + delta, *RANGE) - images


@functools.partial(jax.jit, static_argnames="norm")
def _pgd_step(net, images, labels, delta, size, norm):
    return pgd(
        lambda x: _losses(net, x, labels), images, None, images.shape[0], start=delta, num_steps=1, step=STEP[norm], norm=norm,
        value_range=RANGE, **size._asdict(),
    )[0]  # fmt: skip


@functools.partial(jax.jit, static_argnames="norm")
def _universal_step(net, images, labels, groups, delta, size, clip_loss, norm):
    return group_ascent(
        lambda x: _losses(net, x, labels), images, delta, groups, step=STEP[norm], norm=norm, clip_loss=clip_loss, value_range=RANGE,
        **size._asdict(),
    )  # fmt: skip


def _checked(function: str, images: Any, labels: Any, norm: str, **sizes: float | None) -> tuple[np.ndarray, np.ndarray]:
    check_ball(function, other="", norm=norm, **sizes)
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{function} needs one label for each of at least one image, got {len(images)} images and {len(labels)} labels. "
            "Pass arrays of one length."
        )
    if wrong := trouble(labels):
        raise ValueError(f"{function} needs labels 0, 1, 2, …, got {wrong[0]}. {wrong[1]}")
    if labels.min() < 0:
        raise ValueError(f"{function} needs labels 0, 1, 2, …, got {labels.min()}. Drop those below 0.")
    if images.dtype == np.uint8:
        return images, labels.astype(np.int32)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{function} needs images, float in [0, 1] or uint8, got {images.dtype}. Words can't be moved a little: leave texts out."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6) or math.isnan(low + high):
        raise ValueError(
            f"{function} needs pixels in [0, 1], got values from {low:g} to {high:g}. Write images / 255 for grey levels, and let "
            "logits_of normalise them."
        )
    return images, labels.astype(np.int32)
