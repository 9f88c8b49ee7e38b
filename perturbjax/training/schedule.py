"""The learning rate's course over a run, as a factor of the base learning rate: linear warm-up, then cosine, steps or nothing.

    Schedule()                                                                    cosine to zero after one epoch of warm-up
    Schedule("step", warmup_epochs=0, milestones=(100, 150))                      ÷10 after epochs 100 and 150
    Schedule("step", warmup_epochs=0, milestones=(60, 120, 160), decay=0.2)       ×0.2 at each
    Schedule("step", warmup_epochs=5, milestones=(160, 180), decay=(1e-2, 1e-4))  LDAM's: ×0.01 from 160 on, ×0.0001 from 180 on

Everything is counted in epochs that are over, fractions allowed, and doesn't scale with the run: a milestone that the run doesn't
reach is an error. The named recipes (`perturbjax.training.recipes`) scale theirs with their epochs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.checks import check_choice, check_number

KINDS = ("cosine", "step", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate changes. Hashable: a part of the run's structure."""

    kind: str = "cosine"
    """After the warm-up: "cosine" to zero at the last step, "step" or "constant"."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up; of w steps, step t takes (t + 1) / (w + 1). 0: none."""
    milestones: tuple[float, ...] = ()
    """For "step": epochs after which the factor changes, increasing."""
    decay: float | tuple[float, ...] = 0.1
    """For "step": one number multiplies at every milestone; a tuple gives the factor from each milestone on."""

    def __post_init__(self):
        check_choice("Schedule", "kind", self.kind, KINDS)
        for name in ("milestones", "decay"):  # lists and arrays as hashable tuples
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(np.asarray(value).tolist()) if np.ndim(value) else value)
        check_number("Schedule", low=0, warmup_epochs=self.warmup_epochs)
        check_number("Schedule", low=0, high=1, open_low=True, decay=self.decay)
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError(
                f"Schedule needs milestones for kind 'step' and for no other, got {self.kind!r} with milestones="
                f"{self.milestones}. Write Schedule('step', milestones=(100, 150)), or leave the milestones out."
            )
        check_number("Schedule", low=0, open_low=True, milestones=self.milestones)
        if any(late <= early for early, late in zip(self.milestones, self.milestones[1:])):
            raise ValueError(
                f"Schedule needs increasing milestones, got {self.milestones}. Write {tuple(sorted(set(self.milestones)))}."
            )
        if self.milestones and self.milestones[0] < self.warmup_epochs:
            raise ValueError(
                f"Schedule needs milestones after its {self.warmup_epochs:g} epochs of warm-up, got {self.milestones}. "
                f"Write warmup_epochs={self.milestones[0] / 2:g}."
            )
        if isinstance(self.decay, tuple) and self.kind == "step" and len(self.decay) != len(self.milestones):
            raise ValueError(
                f"Schedule needs one number for decay, or one for each of the {len(self.milestones)} milestones, "
                f"got {self.decay}. Write decay=0.1 to divide by ten at each."
            )

    @property
    def factors(self) -> tuple[float, ...]:
        """The factor from each milestone on."""
        if isinstance(self.decay, tuple):
            return self.decay
        return tuple(self.decay**i for i in range(1, len(self.milestones) + 1))

    def factor(self, steps_per_epoch: int, total_steps: int) -> Callable[[jax.Array], jax.Array]:
        """An optax schedule: the number of steps taken, which may be traced, to the factor of the base learning rate.

        >>> f = Schedule("step", warmup_epochs=0, milestones=(2, 3)).factor(steps_per_epoch=10, total_steps=40)
        >>> [round(float(f(step)), 3) for step in (0, 19, 20, 30)]
        [1.0, 1.0, 0.1, 0.01]
        """
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if warmup > total_steps:
            epochs = total_steps / steps_per_epoch
            raise ValueError(
                f"Schedule needs a warm-up within the run, {epochs:g} epochs, got warmup_epochs={self.warmup_epochs:g}: it would never reach "
                f"the base learning rate. Write warmup_epochs={epochs / 10:g}, or train for more epochs."
            )
        boundaries = [round(milestone * steps_per_epoch) for milestone in self.milestones]
        if self.milestones and self.milestones[-1] * steps_per_epoch >= total_steps:
            epochs = total_steps / steps_per_epoch
            raise ValueError(
                f"Schedule needs milestones before the end of the run, {epochs:g} epochs, got {self.milestones}. "
                f"Write milestones={tuple(round(m * 0.9 * epochs / self.milestones[-1], 2) for m in self.milestones)}, "
                "or train for more epochs."
            )
        if self.kind == "cosine":
            parts = [optax.cosine_decay_schedule(1.0, max(total_steps - warmup, 1))]
        else:
            parts = [optax.constant_schedule(value) for value in (1.0, *self.factors[: len(boundaries)])]
        if warmup >= 1:
            parts, boundaries = [optax.linear_schedule(1 / (warmup + 1), 1.0, warmup), *parts], [warmup, *boundaries]
        return optax.join_schedules(parts, boundaries) if boundaries else parts[0]


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Class-balanced fine-tuning: the last part of training on class-balanced batches (`balanced_order`), at a small learning rate.

    >>> FineTuning().first_epoch(30)
    27
    """

    start: float = 0.9
    """Share of the epochs that are over when it begins; whole epochs, and at least the last one."""
    rate: float = 0.1
    """Factor of what the schedule gives there. After steps, and with a constant rate, that is a tenth of the last one."""

    def __post_init__(self):
        check_number("FineTuning", low=0, high=1, start=self.start)
        check_number("FineTuning", low=0, rate=self.rate)

    def first_epoch(self, epochs: int) -> int:
        """Epochs before it."""
        return min(int(self.start * epochs + 1e-9), epochs - 1)

    def slowed(self, factor: Callable[[jax.Array], jax.Array], first_step: int) -> Callable[[jax.Array], jax.Array]:
        """The schedule `factor`, times `rate` from the step on."""
        return lambda step: factor(step) * jnp.where(jnp.asarray(step) >= first_step, jnp.float32(self.rate), jnp.float32(1))
