r"""SWAD: the mean of the weights of all steps in a window that begins where the validation loss is low and ends before it rises.

    losses v_1, v_2, … at the ends of the intervals between evaluations;   s = the first k with v_k = min(v_k, …, v_{k+N_s−1})
    θ = (1 + r) · mean(v_s, …, v_{s+N_s−1});   e = j − N_e for the first j after these with min(v_{j−N_e+1}, …, v_j) > θ
    w̄ = mean of the weights after every step of the intervals s, …, e;   training ends at j              N_s = 3, N_e = 6, r = 0.3

Without such a j the window goes on to the last interval; without such an s it is the last interval alone. Three parts: `swad`, an optax
link that adds up the weights of the present interval; `swad_window`, the rule above; `SWADAverage`, which keeps what the rule may still
need while training goes on. BatchNorm's running statistics belong to no average: compute them anew for w̄.
Source: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, Algorithm 1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.checks import check_number
from perturbjax.classes import at_least_float32
from perturbjax.method import method

CONVERGE, PATIENCE, TOLERANCE = 3, 6, 0.3


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


class SWADState(NamedTuple):
    """State of `swad`."""

    total: Any  # sum of the weights seen in this interval, float32, like the parameters
    steps: jax.Array  # [] int32, updates since the interval began


@method(
    target="parameter", direction=(), inference="prior", granularity="corpus",
    cite="Cha et al., NeurIPS 2021", gradient="keeps", off=None,
)  # fmt: skip
def swad() -> optax.GradientTransformationExtraArgs:
    """An optax link that changes no update: it adds up the weights of an interval, for `swad_interval`.

    It sees the weights *before* each step, so that it may stand anywhere in the chain; the first ones it sees in an interval are
    those that the interval before ended with. Training with it is plain training, until somebody takes the average: experiments/domains.py
    evaluates, decides on the window and reports the averaged weights.
    """

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
    """The average over the window while training goes on: keeps at most max(N_s, N_e) intervals beside one sum, in host memory.

    converge, patience, tolerance: as in `swad_window`.
    """

    converge: int = CONVERGE
    patience: int = PATIENCE
    tolerance: float = TOLERANCE
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of all intervals so far."""
    _pending: dict[int, tuple[Any, int]] = dataclasses.field(default_factory=dict)
    _total: Any = None
    _steps: int = 0

    def add(self, loss: float, mean: Any, steps: int) -> bool:
        """Takes an interval: its validation loss, the mean of its weights, its steps. True once the window has ended: stop training."""
        if self.ended:
            return True
        self._pending[len(self.losses)] = (jax.tree.map(np.asarray, mean), steps)
        self.losses.append(float(loss))
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

    @property
    def window(self) -> tuple[int | None, int]:
        """As in `swad_window`."""
        return swad_window(self.losses, converge=self.converge, patience=self.patience, tolerance=self.tolerance)

    @property
    def ended(self) -> bool:
        """Whether the window has ended before the last interval."""
        return bool(self.losses) and self.window[1] < len(self.losses) - 1

    def average(self) -> Any:
        """The weights w̄, in the dtype of the means given (float32)."""
        first, last = self.window
        total, steps = self._total, self._steps
        for k in sorted(self._pending):
            if (last if first is None else first) <= k <= last:
                total, steps = _plus(total, steps, *self._pending[k])
        return jax.tree.map(lambda t, w: (t / steps).astype(w.dtype), total, next(iter(self._pending.values()))[0])

    def _fold(self, mean: Any, steps: int) -> None:
        self._total, self._steps = _plus(self._total, self._steps, mean, steps)


def _plus(total: Any, steps: int, mean: Any, more: int) -> tuple[Any, int]:
    weighted = jax.tree.map(lambda m: np.float64(more) * m, mean)
    return (weighted if total is None else jax.tree.map(np.add, total, weighted)), steps + more
