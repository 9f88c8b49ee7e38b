r"""Numbers that follow the run, and when a link is active at all: the settings of RTS, and radii of the whole SAM family.

    cosine      last + (first − last) · ½(1 + cos(π s)),   s: the share of the present cycle that is over
    linear      last + (first − last) · (1 − progress)
    by_rate     ρ_min + (ρ_max − ρ_min)(lr_t − lr_min)/(lr_max − lr_min)        GSAM

    always, never, after(0.3), last(0.3), every(5), plateau(patience=500)

All of them are small frozen values. They read where training stands from what the trainer gives each update (`step`, `progress`,
`value`, `rate`); in a loop of one's own: tx.update(..., step=step, progress=step / total_steps, value=loss). Timings other than
`plateau` look at `step` and `progress` only, which stay one number when seeds are vmapped: an inactive step then really skips the
second gradient. `plateau` looks at each run's own loss: vmapped runs pay for both branches at every step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, is_traced
from perturbjax.classes import number, wide
from perturbjax.link import CLOSE, reached

LOOKED_AT = (0, 1, 10)  # steps at which a schedule's values are checked on the host


class Place(NamedTuple):
    """Where training stands; None: not given to the update."""

    step: Any  # [] int32; the link's own count if not given
    progress: Any  # [], step / total steps
    value: Any  # [] the loss
    rate: Any  # [] the learning rate over the highest one

    @classmethod
    def of(cls, count: jax.Array, extra_args: Mapping[str, Any]) -> "Place":
        """From the extra arguments of an update."""
        step = extra_args.get("step")
        return cls(count if step is None else step, *(extra_args.get(name) for name in ("progress", "value", "rate")))

    def need(self, who: str, name: str) -> jax.Array:
        """One of the fields in at least float32; raises ValueError, naming the call that works, if it was not given."""
        given = getattr(self, name)
        if given is None:
            how = {"progress": "step / total_steps", "value": "loss", "rate": "learning_rate / highest_learning_rate"}[name]
            raise ValueError(f"{who} needs `{name}`, got none: call tx.update(grads, state, params, ..., {name}={how}).")
        return number(given)


# ------------------------------------------------------------------------------------------------- numbers that follow the run


@dataclasses.dataclass(frozen=True)
class Course:
    """A number that goes from `first` to `last` over the run; made by `cosine`, `linear` or `by_rate`."""

    shape: Literal["cosine", "linear", "by_rate"]
    first: ArrayLike
    last: ArrayLike
    cycles: int = 1
    growth: ArrayLike = 1.0
    floor: ArrayLike = 0.0

    def at(self, place: Place) -> jax.Array:
        """Its value there, [], of the float type of what it follows."""
        followed = place.need(self.shape, "rate" if self.shape == "by_rate" else "progress")
        first, last, growth, floor = (jnp.asarray(x, followed.dtype) for x in (self.first, self.last, self.growth, self.floor))
        if self.shape == "by_rate":
            weight = jnp.clip((followed - floor) / (1 - floor), 0, 1)
        else:
            over = jnp.clip(followed, 0, 1)
            if self.shape == "cosine":
                lengths = growth ** jnp.arange(self.cycles, dtype=over.dtype)
                ends = jnp.cumsum(lengths) / lengths.sum()
                cycle = jnp.minimum(jnp.sum(over + CLOSE >= ends), self.cycles - 1)  # the last one includes its end
                begin = jnp.where(cycle > 0, ends[cycle - 1], 0)
                over = jnp.clip((over - begin) / (ends[cycle] - begin), 0, 1)
                over = 0.5 * (1 - jnp.cos(jnp.pi * over))
            weight = 1 - over
        return last + (first - last) * weight


def cosine(first: ArrayLike = 1.0, last: ArrayLike = 0.0, cycles: int = 1, growth: ArrayLike = 1.0) -> Course:
    """From `first` down to `last` along half a cosine over the run; `cycles` > 1 starts again, each `growth` times as long.

    >>> half = Place(step=50, progress=0.5, value=None, rate=None)
    >>> float(cosine(first=2.0).at(half)), float(cosine(first=2.0, cycles=2).at(half))
    (1.0, 2.0)
    """
    check_number("cosine", first=first, last=last)
    check_number("cosine", low=1, cycles=cycles)
    check_number("cosine", low=0, open_low=True, growth=growth)
    return Course("cosine", first, last, cycles=cycles, growth=growth)


def linear(first: ArrayLike = 1.0, last: ArrayLike = 0.0) -> Course:
    """From `first` to `last` in a straight line over the run."""
    check_number("linear", first=first, last=last)
    return Course("linear", first, last)


def by_rate(high: ArrayLike = 0.05, low: ArrayLike = 0.0, floor: ArrayLike = 0.0) -> Course:
    """GSAM's radius: `high` where the learning rate is highest, `low` where it is lowest, in proportion between.

    floor: the lowest learning rate over the highest; 0 for a cosine to zero. (Zhuang et al., ICLR 2022.)
    """
    check_number("by_rate", high=high, low=low)
    check_number("by_rate", low=0, high=1 - CLOSE, floor=floor)
    return Course("by_rate", high, low, floor=floor)


Setting = float | jax.Array | Callable[[ArrayLike], ArrayLike] | Course
"""A number, an optax schedule (of the step), or one of the above."""


def check_setting(function: str, *, rate: bool = True, **named: Setting) -> None:
    """Raises ValueError if a setting is negative or nan as far as the host can see: ends of a course, first steps of a schedule.

    rate: whether the learning rate is known where the setting is read (links of the optimiser), so that `by_rate` may be one.
    """
    for name, setting in named.items():
        if isinstance(setting, Course):
            if setting.shape == "by_rate" and not rate:
                raise ValueError(
                    f"{function} needs {name} to follow the progress, got by_rate(...): the loss knows no learning rate. "
                    f"Write {name}=cosine(...) or {name}=linear(...)."
                )
            for value in (setting.first, setting.last):
                check_number(function, low=0, **{name: value})
        elif callable(setting):
            for step in LOOKED_AT:
                with jax.numpy_dtype_promotion("standard"):  # strict is about the user's loop, not about this look
                    value = setting(jnp.int32(step))
                if not is_traced(value) and not (np.asarray(value) >= 0).all():
                    shown = value if np.ndim(value) else f"{float(value):g}"
                    raise ValueError(
                        f"{function} needs {name} >= 0 at every step, got {shown} at step {step}. "
                        f"Write {name}=lambda step: jnp.maximum(schedule(step), 0)."
                    )
        else:
            check_number(function, low=0, **{name: setting})


def at(setting: Setting, place: Place) -> Any:
    """The setting's value there. One that is negative or nan there becomes nan, and so do the parameters: the trainer then names
    the link and the step, where a silent descent instead of the climb would go on unseen."""
    if isinstance(setting, (int, float)):  # seen by `check_setting`
        return setting
    value = setting.at(place) if isinstance(setting, Course) else setting(place.step) if callable(setting) else setting
    return not_negative(value)


def not_negative(value: ArrayLike) -> jax.Array:
    """The value in at least float32; nan where it is negative."""
    value = wide(jnp.asarray(value))
    return jnp.where(value >= 0, value, jnp.nan)


# ------------------------------------------------------------------------------------------------------- when a link is active


@dataclasses.dataclass(frozen=True)
class Timing:
    """Active from the share `start` of the run on, at steps that `every` divides; made by `always`, `after`, `every` ..."""

    start: float = 0.0
    stride: int = 1

    @property
    def switches(self) -> bool:
        """Whether a run has both active and inactive steps, as far as is known beforehand."""
        return 0 < self.start < 1 or (self.stride > 1 and self.start < 1)

    def init(self) -> Any:
        """What it remembers between steps."""
        return ()

    def active(self, memory: Any, place: Place) -> tuple[Any, Any]:
        """(whether the link is active at this step: a Python bool where that is certain, else [] bool; what to remember)."""
        if self.start >= 1:
            return False, memory
        now: Any = True
        if self.start > 0:
            now = reached(place.need("timing", "progress"), self.start)
        if self.stride > 1:
            now = (place.step % self.stride == 0) & now
        return now, memory


class PlateauState(NamedTuple):
    """What `plateau` remembers."""

    smooth: jax.Array  # [], running mean of the loss; inf before the first
    best: jax.Array  # [], its lowest value, inf before the first
    waited: jax.Array  # [] int32, steps since it improved
    on: jax.Array  # [] bool, whether a plateau was reached


@dataclasses.dataclass(frozen=True)
class Plateau(Timing):
    """Active once the smoothed loss has stopped to fall; made by `plateau`."""

    patience: int = 100
    threshold: ArrayLike = 1e-3
    decay: ArrayLike = 0.9
    stay: bool = True

    @property
    def switches(self) -> bool:
        return True

    def init(self) -> PlateauState:
        inf = jnp.full([], jnp.inf, jnp.result_type(float))
        return PlateauState(inf, inf, jnp.zeros([], jnp.int32), jnp.zeros([], bool))

    def active(self, memory: PlateauState, place: Place) -> tuple[jax.Array, PlateauState]:
        value = place.need("plateau", "value").astype(memory.smooth.dtype)
        threshold, decay = (jnp.asarray(x, value.dtype) for x in (self.threshold, self.decay))
        smooth = jnp.where(jnp.isinf(memory.smooth), value, decay * memory.smooth + (1 - decay) * value)
        better = jnp.isinf(memory.best) | (smooth < memory.best - threshold * jnp.abs(memory.best))
        best, waited = jnp.where(better, smooth, memory.best), jnp.where(better, 0, memory.waited + 1)
        on = (waited >= self.patience) | (memory.on & self.stay)
        return on, PlateauState(smooth, best, waited, on)


def static(*names: str) -> Callable:
    """Marks numbers of a helper as structure for the command line: as traced numbers they would be batched when runs are vmapped,
    and both branches would run."""

    def wrap(helper):
        helper.resolve_structure = lambda settings: {name: settings[name] for name in names}
        return helper

    return wrap


def always() -> Timing:
    """Active at every step."""
    return Timing()


def never() -> Timing:
    """Active at no step."""
    return Timing(start=1.0)


@static("fraction")
def after(fraction: float = 0.5) -> Timing:
    """Active once this share of the run is over: the first step s with s/total >= fraction, and all later ones."""
    check_number("after", low=0, high=1, fraction=fraction)
    return Timing(start=float(fraction))


@static("fraction")
def last(fraction: float = 0.5) -> Timing:
    """Active in the last share of the run: `after(1 - fraction)`."""
    check_number("last", low=0, high=1, fraction=fraction)
    return Timing(start=1 - float(fraction))


@static("start")
def every(steps: int = 2, start: float = 0.0) -> Timing:
    """Active at steps 0, k, 2k, ... with k = `steps`; with `start`, only after that share of the run."""
    check_number("every", low=1, steps=steps)
    check_number("every", low=0, high=1, start=start)
    return Timing(start=float(start), stride=int(steps))


def plateau(patience: int = 100, threshold: ArrayLike = 1e-3, decay: ArrayLike = 0.9, stay: bool = True) -> Timing:
    """Active once the running mean of the loss has not fallen by `threshold` (of itself) for `patience` steps.

    decay: of that running mean. stay: from then on for good; False: until the loss falls again.
    """
    check_number("plateau", low=1, patience=patience)
    check_number("plateau", low=0, threshold=threshold)
    check_number("plateau", low=0, high=1, decay=decay)
    return Plateau(patience=patience, threshold=threshold, decay=decay, stay=stay)
