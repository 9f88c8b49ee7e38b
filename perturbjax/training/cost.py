"""What a method's training step costs relative to plain training: medians of paired runs in one process.

Timings on a shared machine vary by a factor of two, so single ones are worth nothing. Here every round runs each program once,
in turn, and the ratio is taken within the round.
"""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


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
