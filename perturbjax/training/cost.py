"""What a method's training step costs relative to plain training: medians of paired runs in one process.

Timings on a shared machine vary by a factor of two, so single ones are worth nothing. Here every round runs each program once,
in turn, and the ratio is taken within the round.
"""

import itertools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.data import Dataset
from perturbjax.training.devices import Devices
from perturbjax.training.feed import Call, Feed, streams
from perturbjax.training.step import DeviceData, Recipe, as_arrays, compiled_step, device_data, init_state, sample_data


class TimedStep:
    """A program for `cost_ratios`: each call trains one more step and returns its metrics; `state` is what it has reached.

    batch: from `first_batch`, for every step; None: the first B samples. feed: where each step's samples come from instead.
    """

    def __init__(
        self,
        recipe: Recipe,
        numbers: dict,
        dataset: Dataset,
        *,
        batch: tuple[DeviceData, Call] | None = None,
        feed: Feed | None = None,
    ):
        self.state = init_state(recipe, numbers, sample_data(dataset), 0)
        self._step, self._numbers = compiled_step(recipe), as_arrays(numbers)
        if batch is not None:
            self._data, calls = batch[0], itertools.repeat(batch[1])
        elif feed is not None:
            self._data, calls = feed.data(), feed.calls(0)
        else:
            rows = jnp.arange(recipe.batch_size, dtype=jnp.int32)[None]
            self._data, calls = device_data(dataset), itertools.repeat(Call(0, 1, rows, None, False))
        self._batches = ((call.index, call.images) for call in calls)

    def __call__(self) -> dict[str, jax.Array]:
        self.state, metrics, _ = self._step(self.state, self._numbers, self._data, *next(self._batches))
        return metrics


def first_batch(recipe: Recipe, dataset: Dataset, stream: bool | None = None) -> tuple[DeviceData, Call]:
    """The data and the first batch of a run, for all programs of one timing: the images lie on the device once, or where training
    streams them (`Options.stream`) those of the batch only."""
    feed = Feed(recipe, [dataset], [0], Devices(), 1, streams(dataset, stream), False)
    return feed.data(), feed.example(1)


def cost_ratios(
    programs: Mapping[str, Callable[[], object]], reference: str, *, rounds: int = 9, steps: int = 1
) -> dict[str, float]:
    """Median over rounds of each program's time divided by the reference's in the same round.

    Args:
      programs: name -> a call that runs one step and returns arrays to wait for; warmed up (compiled) here, outside the clock.
      reference: the name to divide by; its own ratio is 1.
      rounds: interleaved rounds; steps: calls per round and program (more for very short steps).
    """
    for run in programs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        # Alternating order: whatever drifts over a round hits both sides.
        for name in list(programs)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            for _ in range(steps):
                out = programs[name]()
            jax.block_until_ready(out)
            times[name].append(time.perf_counter() - started)
    base = np.asarray(times[reference])
    return {name: float(np.median(np.asarray(took) / base)) for name, took in times.items()}
