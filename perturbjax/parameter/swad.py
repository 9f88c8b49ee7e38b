r"""SWAD: the mean of the weights of all steps in a window that begins where the validation loss is low and ends before it rises.

    losses v_1, v_2, … at the ends of the intervals between evaluations;   s = the first k with v_k = min(v_k, …, v_{k+N_s−1})
    θ = (1 + r) · mean(v_s, …, v_{s+N_s−1});   e = j − N_e for the first j after these with min(v_{j−N_e+1}, …, v_j) > θ
    w̄ = mean of the weights after every step of the intervals s, …, e;   training ends at j              N_s = 3, N_e = 6, r = 0.3

Without such a j the window goes on to the last interval; without such an s it is the last interval alone. Parts: `swad`, an optax
link that adds up the weights of the present interval; `swad_window`, the rule above; `swad_counts`, that of the authors' code, whose
window begins before s; `SWADAverage`, which keeps what a rule may still need while training goes on. BatchNorm's running statistics
belong to no average: compute them anew for w̄.
Source: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, Algorithm 1; github.com/khanrc/swad.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import at_least_float32
from perturbjax.method import method

CONVERGE, PATIENCE, TOLERANCE = 3, 6, 0.3
RULES = ("paper", "code")


def swad_window(
    losses: Sequence[float], *, converge: int = CONVERGE, patience: int = PATIENCE, tolerance: float = TOLERANCE
) -> tuple[int | None, int]:
    """(first, last) interval of the window, counted from 0; first is None as long as the loss has not converged.

    Training may end as soon as last < len(losses) − 1.

    Args:
      losses: validation losses at the ends of the intervals so far.
      converge: N_s, patience: N_e, tolerance: r.

    >>> swad_window([3.0, 1.0, 1.2, 1.1, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0], patience=3)
    (1, 3)
    """
    check_number("swad_window", low=1, converge=converge, patience=patience)
    check_number("swad_window", low=0, tolerance=tolerance)
    if len(losses) == 0:
        raise ValueError("swad_window needs the loss of at least one interval, got none. Evaluate first.")
    v = np.asarray(losses, np.float64)
    final = len(v) - 1
    starts = [k for k in range(len(v) - converge + 1) if v[k] == v[k : k + converge].min()]
    if not starts:
        return None, final
    first = starts[0]
    threshold = (1 + tolerance) * v[first : first + converge].mean()
    for j in range(first + max(patience, converge), len(v)):
        if v[j - patience + 1 : j + 1].min() > threshold:
            return first, j - patience
    return first, final


def swad_counts(
    losses: Sequence[float],
    *,
    converge: int = CONVERGE,
    patience: int = PATIENCE,
    tolerance: float = TOLERANCE,
    finished: bool = True,
) -> tuple[list[int], bool]:
    """(how often the mean of each interval counts in the authors' code, whether the window has ended there).

    There the average begins with the N_e − N_s intervals up to s, those after the last one above θ and one more left out; from the
    N_e-th evaluation after that of s on, each adds the interval N_e − 1 before it, as long as one of the last N_e losses is at most θ.
    So s may count twice, and early intervals several times where training converges before its N_e-th evaluation. At the end of
    training the intervals that still wait are added as long as one of those left is at most θ. No interval is weighed by its number
    of steps; without convergence it is the last one alone.

    Args:
      losses, converge, patience, tolerance: as in `swad_window`.
      finished: whether training is over.

    >>> swad_counts([3.0, 2.9, 2.8, 2.7, 1.0, 1.2, 1.1, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    ([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], True)
    """
    check_number("swad_counts", low=1, converge=converge, patience=patience)
    check_number("swad_counts", low=0, tolerance=tolerance)
    first = swad_window(losses, converge=converge, patience=patience, tolerance=tolerance)[0]
    counts, ended = _added(losses, first, converge, patience, tolerance, finished)
    if not any(counts):  # nothing has been added to the interval that the average is begun with
        counts[-1 if first is None else first] = 1
    return counts, ended


def _added(
    losses: Sequence[float], first: int | None, converge: int, patience: int, tolerance: float, finished: bool
) -> tuple[list[int], bool]:
    """`swad_counts` of a loss that has converged at `first`, without the interval that stands for none."""
    counts, newest = [0] * len(losses), len(losses) - 1
    if first is None:
        return counts, False
    threshold = (1 + tolerance) * np.asarray(losses[first : first + converge], np.float64).mean()
    known = first + converge - 1  # the evaluation at which it has converged
    waiting = lambda j: range(max(0, j - patience + 1), j + 1)
    if patience < converge:
        begun = list(range(first + 1, first + 1 + converge - patience))
    elif patience > converge:
        early = list(waiting(known))[: patience - converge + 1]
        above = [k for k in early if losses[k] > threshold]
        begun = [k for k in early if k > (above[-1] + 1 if above else early[0])]
    else:
        begun = []
    for k in begun:
        counts[k] += 1
    for j in range(known + 1, len(losses)):
        if waiting(j)[0] < first:
            continue
        if min(losses[k] for k in waiting(j)) > threshold:
            return counts, True
        counts[waiting(j)[0]] += 1
    if finished:
        left = list(waiting(newest))[1:]
        while left and min(losses[k] for k in left) <= threshold:
            counts[left.pop(0)] += 1
    return counts, False


class SWADState(NamedTuple):
    """State of `swad`."""

    total: Any  # sum of the weights seen in this interval, float32, like the parameters
    steps: jax.Array  # [] int32, updates since the interval began


@method(
    target="parameter", direction=(), inference="prior", granularity="corpus",
    cite="Cha et al., NeurIPS 2021", gradient="keeps", off=None, asks=lambda settings: {"swad_rule": settings["rule"]},
)  # fmt: skip
def swad(*, rule: Literal["paper", "code"] = "paper") -> optax.GradientTransformationExtraArgs:
    """An optax link that changes no update: it adds up the weights of an interval, for `swad_interval`.

    It sees the weights *before* each step, so that it may stand anywhere in the chain; the first ones it sees in an interval are
    those that the interval before ended with. Training with it is plain training, until somebody takes the average: experiments/domains.py
    evaluates, decides on the window and reports the averaged weights.

    Args:
      rule: which window is wanted of whoever takes the average: that of the "paper" (`swad_window`), or the authors' "code"
        (`swad_counts`). In a loop of your own it is that of your `SWADAverage`.
    """
    check_choice("swad", "rule", rule, RULES)

    def init(params):
        zeros = jax.tree.map(lambda w: jnp.zeros(jnp.shape(w), at_least_float32(w.dtype)), params)
        return SWADState(zeros, jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args  # meant for other links of the chain
        if params is None:
            raise ValueError("swad needs params, got none. Write tx.update(grads, state, params).")
        counts = state.steps > 0
        total = jax.tree.map(lambda t, w: jnp.where(counts, t + w.astype(t.dtype), t), state.total, params)
        return updates, SWADState(total, optax.safe_increment(state.steps))

    return optax.GradientTransformationExtraArgs(init, update)


def is_swad(state: Any) -> bool:
    """Whether it is the state of a `swad` link."""
    return isinstance(state, SWADState)


def swad_interval(opt_state: optax.OptState, params: Any) -> tuple[Any, int, optax.OptState]:
    """(mean of the weights after each step of the interval, its number of steps, the state with which the next interval begins).

    opt_state: holds the state of one `swad` link, anywhere. params: the weights now. Raises ValueError without a step since the last call.
    """
    found = [state for state in jax.tree.leaves(opt_state, is_leaf=is_swad) if is_swad(state)]
    if len(found) != 1:
        raise ValueError(f"swad_interval needs the state of one swad link, got {len(found)}. Write optax.chain(pj.swad(), tx).")
    [state] = found
    steps = int(state.steps)
    if steps == 0:
        raise ValueError("swad_interval needs a step in the interval, got none. Call it after training on.")
    mean = jax.tree.map(lambda t, w: (t + w.astype(t.dtype)) / steps, state.total, params)
    fresh = SWADState(jax.tree.map(jnp.zeros_like, state.total), jnp.zeros([], jnp.int32))
    return mean, steps, jax.tree.map(lambda x: fresh if is_swad(x) else x, opt_state, is_leaf=is_swad)


@dataclasses.dataclass
class SWADAverage:
    """The average over the window while training goes on: keeps at most max(N_s, N_e) intervals (and one more, by
    the code's rule) beside one sum, in host memory.

    converge, patience, tolerance: as in `swad_window`. rule: "paper", the window of `swad_window`, or "code", the intervals of
    `swad_counts`.
    """

    converge: int = CONVERGE
    patience: int = PATIENCE
    tolerance: float = TOLERANCE
    rule: Literal["paper", "code"] = "paper"
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of all intervals so far."""
    _pending: dict[int, tuple[Any, int]] = dataclasses.field(default_factory=dict)
    _total: Any = None
    _steps: int = 0
    _counted: list[int] = dataclasses.field(default_factory=list)
    """How often each interval is in the sum already (rule "code")."""

    def __post_init__(self) -> None:
        check_choice("SWADAverage", "rule", self.rule, RULES)

    def add(self, loss: float, mean: Any, steps: int) -> bool:
        """Takes an interval: its validation loss, the mean of its weights, its steps. True once the window has ended: stop training."""
        if self.ended:
            return True
        self._pending[len(self.losses)] = (jax.tree.map(np.asarray, mean), steps)
        self.losses.append(float(loss))
        if self.rule == "code":
            return self._add_by_counts()
        first, last = self.window
        newest = len(self.losses) - 1
        # The newest before convergence may be all there is. After it, the window reaches newest − N_e at least, wherever it ends.
        keep_from = newest - self.converge + 2 if first is None else first
        for k in sorted(self._pending):
            if k < keep_from:
                del self._pending[k]
            elif first is not None and k <= min(last, newest - self.patience):
                self._fold(*self._pending.pop(k))
        return self.ended

    def _add_by_counts(self) -> bool:
        """Adds what has come to count with the newest interval."""
        first = swad_window(self.losses, **self._settings)[0]
        counts, ended = _added(self.losses, first, **self._settings, finished=False)
        self._counted.append(0)
        for k in self._due(counts):
            self._fold(self._pending[k][0], 1)
            self._counted[k] += 1
        for k in [k for k in self._pending if k < len(counts) - 1 - max(self.converge, self.patience)]:
            del self._pending[k]
        return ended

    def _due(self, counts: list[int]) -> list[int]:
        """The intervals that are to be added to the sum, each as often as it is missing there."""
        return [k for k in sorted(self._pending) for _ in range(counts[k] - self._counted[k])]

    def _counts(self, *, finished: bool) -> tuple[list[int], bool]:
        return swad_counts(self.losses, finished=finished, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return dict(converge=self.converge, patience=self.patience, tolerance=self.tolerance)

    @property
    def window(self) -> tuple[int | None, int]:
        """As in `swad_window`: the first and the last interval that count."""
        found = swad_window(self.losses, **self._settings)
        if self.rule == "paper" or found[0] is None:
            return found
        counted = np.flatnonzero(self._counts(finished=True)[0])
        return int(counted[0]), int(counted[-1])

    @property
    def ended(self) -> bool:
        """Whether the window has ended before the last interval."""
        if self.rule == "code":
            return bool(self.losses) and self._counts(finished=False)[1]
        return bool(self.losses) and self.window[1] < len(self.losses) - 1

    def average(self) -> Any:
        """The weights w̄, in the dtype of the means given (float32)."""
        if self.rule == "code":
            left = [(self._pending[k][0], 1) for k in self._due(self._counts(finished=True)[0])]
        else:
            first, last = self.window
            left = [self._pending[k] for k in sorted(self._pending) if (last if first is None else first) <= k <= last]
        total, steps = self._total, self._steps
        for mean, more in left:
            total, steps = _plus(total, steps, mean, more)
        return jax.tree.map(lambda t, w: (t / steps).astype(w.dtype), total, next(iter(self._pending.values()))[0])

    def _fold(self, mean: Any, steps: int) -> None:
        self._total, self._steps = _plus(self._total, self._steps, mean, steps)


def _plus(total: Any, steps: int, mean: Any, more: int) -> tuple[Any, int]:
    weighted = jax.tree.map(lambda m: np.float64(more) * m, mean)
    return (weighted if total is None else jax.tree.map(np.add, total, weighted)), steps + more
