r"""How many steps each class takes in the authors' code of LPL, where the paper has K_c = ⌊ε_c/α⌋.

    head_tail       head: K_c = round(S·f·N_c/N_1 − 1) + 1,   tail: K_c = round(S·N_C/N_c − 1) + 1         long tail
    proportional    K_c = b + round(S·|τ − q̄_c| / max_{c′ in its sign group} |τ − q̄_c′| − 1) + 1            balanced

round(...) is the place of a snapshot, at least 0; halves go to the even number. Head and tail are the split's −1 and +1. S is `most`,
f is `head`, b is `base`. Source: github.com/limengyang1992/lpl at 9fe33e8; neither f nor the second rule is in the paper.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.classes import number
from perturbjax.link import Context
from perturbjax.rounding import rounded
from perturbjax.split import Split


class HeadTailSteps(NamedTuple):
    """Made by `head_tail_steps`."""

    most: ArrayLike
    head: ArrayLike


class ProportionalSteps(NamedTuple):
    """Made by `proportional_steps`."""

    most: ArrayLike
    base: ArrayLike
    counted: str


Steps = ArrayLike | HeadTailSteps | ProportionalSteps


def head_tail_steps(most: ArrayLike = 10.0, head: ArrayLike = 0.6) -> HeadTailSteps:
    """By the number of samples: the rarest class takes `most` steps, the most frequent one `most`·`head`.

    The code has most = 10, head = 0.6 for CIFAR-10-LT; 40 and 0.2 for CIFAR-100-LT; 50 and 0.2 for LA + LPL there.
    """
    check_number("head_tail_steps", low=1, most=most)
    check_number("head_tail_steps", low=0, head=head)
    return HeadTailSteps(most, head)


def proportional_steps(
    most: ArrayLike = 10.0, base: ArrayLike = 0.0, counted: Literal["once", "twice"] = "once"
) -> ProportionalSteps:
    """By the distance of q̄_c from τ: `base` + 1 … `base` + `most` steps, the furthest of each sign group the most.

    The split must have a statistic: by accuracy. "twice" is the code: every gradient but a class's last one is added twice, so that
    K counted steps are 2K − 1 (most = 10: 1 … 19; base = 40 with most = 4: 81 … 87, which is hardly varied).
    """
    check_number("proportional_steps", low=1, most=most)
    check_number("proportional_steps", low=0, base=base)
    check_choice("proportional_steps", "counted", counted, ("once", "twice"))
    return ProportionalSteps(most, base, counted)


def class_steps(steps: Steps, *, split: Split, state: Any, context: Context) -> jax.Array:
    """K_c [C] of a rule, with the split's statistics in `state`; or the numbers given, rounded down."""
    if isinstance(steps, HeadTailSteps):
        n, sign = jnp.asarray(context.class_counts, context.dtype), split.direction(state, context)
        most, share = jnp.asarray(steps.most, n.dtype), jnp.asarray(steps.head, n.dtype)
        head, tail = n * (most * share) / n.max(), n.min() * most / jnp.maximum(n, 1)
        return _snapshot(jnp.where(sign < 0, head, tail)) + 1
    if isinstance(steps, ProportionalSteps):
        q, tau = split.statistic(state, context, "linear")
        distance, sign = jnp.abs(tau - q), split.direction(state, context)
        furthest = lambda group: jnp.max(jnp.where(group, distance, 0))
        largest = jnp.where(sign < 0, furthest(sign < 0), furthest(sign > 0))
        place = _snapshot(distance / jnp.where(largest > 0, largest, 1) * jnp.asarray(steps.most, distance.dtype))
        return _whole(steps.base).astype(place.dtype) + place + 1
    return jnp.broadcast_to(_whole(steps), [context.num_classes])


def _whole(x: ArrayLike) -> jax.Array:
    """x rounded down, with the guard of `lpl_steps`."""
    return jnp.floor(number(x) + 1e-4)


def _snapshot(x: jax.Array) -> jax.Array:
    """The code's 0-based place; it has no lower limit for the head-tail rule, where a place below 0 would be the last one."""
    return jnp.maximum(rounded(jnp.maximum(x - 1, 0)), 0)


def largest_steps(steps: Steps) -> float | None:
    """The largest K_c that can occur; None if it can't be known here (traced)."""
    if is_traced(steps):
        return None
    if isinstance(steps, HeadTailSteps):
        return float(np.ceil(np.max(np.asarray(steps.most)) * max(1.0, float(np.max(np.asarray(steps.head))))))
    if isinstance(steps, ProportionalSteps):
        return float(np.ceil(np.max(np.asarray(steps.most))) + np.ceil(np.max(np.asarray(steps.base))))
    return float(np.ceil(np.max(np.asarray(steps))))


def steps_need(steps: Steps | None) -> tuple[str, ...]:
    """What a link with this rule must be given (see Perturbation.needs)."""
    return ("class_counts",) if isinstance(steps, HeadTailSteps) else ()
