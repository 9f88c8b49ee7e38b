r"""Logit perturbation learning (LPL): one perturbation of the logits per class, found by gradient steps.

    u⁰ = u,   uᵏ⁺¹ = uᵏ + s_c · α · mean_{j: y_j = c}(softmax(uᵏ_j) − ŷ_j)   for k < K_c = ⌊ε_c/α⌋,   loss at u^K

s_c = +1 raises the loss of class c, −1 lowers it (eqs. 11–17, Algorithm 2); the bound ε_c sets the number of steps, fixed or
varied by class (eqs. 18–19). This is Algorithm 2 as printed; the authors' code also divides each class's step by a norm.
Source: Li, Su, Wu, Zhang, "Logit Perturbation", AAAI 2022.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.bound import Bound, check_bound, largest, needs, radius
from perturbjax.checks import check_logits_labels, check_number, is_traced
from perturbjax.classes import AxisName, wide
from perturbjax.core import Context, Flow, Perturbation, Rest, method
from perturbjax.inference.pgd import UNROLLED, pgd
from perturbjax.split import Clean, Split, as_split

DEFAULT_BOUND = 1.0


def lpl_delta(
    logits: jax.Array,
    labels: jax.Array,
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    step_size: ArrayLike,
    max_steps: int | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The perturbation itself: [B, C], equal within a class; no gradient flows through it into the logits.

    Args:
      logits: [B, C], any float type (computed in at least float32).
      labels: [B] integers in 0..C-1; others (padding) get zeros.
      direction: s_c, +1 raises the loss of class c, −1 lowers it; a number or [C].
      bound: ε_c in units of step_size·steps; a number or [C]. step_size: α. All three may be traced.
      max_steps: static limit of K_c; None: read off bound and step_size, which must not be traced then.
      axis_name: mapped axis to take class means over; None: this is the whole batch.

    Raises:
      ValueError: shapes that don't fit, a loop length that can't be known, or a max_steps too small for bound and step_size.

    >>> u, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    >>> print(lpl_delta(u, y, direction=jnp.array([1.0, -1.0]), bound=0.2, step_size=0.1).round(3))
    [[-0.024  0.024]
     [-0.053  0.053]]
    """
    check_logits_labels("lpl_delta", logits, labels)
    logits = wide(logits)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    cross_entropy = lambda u: -jnp.sum(targets * jax.nn.log_softmax(u, axis=-1), axis=-1)
    max_steps = _loop_length(None if is_traced(bound) else bound, step_size, max_steps)
    delta, _ = pgd(
        cross_entropy, logits, labels, logits.shape[-1], direction=direction, step_size=step_size,
        num_steps=lpl_steps(bound, step_size), max_steps=max_steps, step="raw", axis_name=axis_name,
    )  # fmt: skip
    return delta


def lpl_steps(bound: ArrayLike, step_size: ArrayLike) -> jax.Array:
    """K_c = ⌊ε_c/α⌋ (eq. 19), with a guard: 0.9/0.3 is 2.9999998 in float32, and is three steps."""
    return jnp.floor(jnp.asarray(bound, jnp.float32) / step_size + 1e-4)


def _loop_length(most: Any, step_size: Any, max_steps: int | None) -> int:
    """Static loop length: max_steps, or for a largest bound 10, 20, 40 …, so that nearby bounds share one compiled program."""
    check_number("lpl", low=0, open_low=True, step_size=step_size)
    if most is None or is_traced(step_size):
        if max_steps is not None:
            return int(max_steps)
        raise ValueError(
            "lpl needs max_steps when bound or step_size is traced or a schedule, got None: the loop's length is part of the "
            "program. Pass max_steps=10, the largest floor(bound / step_size) that will occur."
        )
    if not np.isfinite(most).all():
        raise ValueError(f"lpl needs a finite bound, got {most}. It sets the number of steps, floor(bound / step_size).")
    needed, length = int(np.floor(np.max(most) / np.min(step_size) + 1e-4)), UNROLLED
    if max_steps is not None:
        if max_steps < needed:
            raise ValueError(
                f"lpl needs max_steps >= floor(bound / step_size) = {needed}, got {max_steps}. "
                f"Pass max_steps={needed}, or leave it out."
            )
        return int(max_steps)
    while length < needed:
        length *= 2
    return length


def _resolve(settings: dict) -> dict:
    most = largest(settings["bound"], default=DEFAULT_BOUND)
    return {"max_steps": _loop_length(most, settings["step_size"], settings["max_steps"])}


@method(
    target="logit", direction=(+1, -1), inference="adversarial", granularity="category",
    cite="Li et al., AAAI 2022", off=dict(bound=0.0), resolve_structure=_resolve,
)  # fmt: skip
def lpl(
    *,
    bound: Bound = DEFAULT_BOUND,
    step_size: ArrayLike = 0.1,
    split: Split | Literal["accuracy", "frequency", "variance", "all"] = "accuracy",
    tau: ArrayLike | str | None = None,
    direction: ArrayLike | None = None,
    project: bool = False,
    max_steps: int | None = None,
) -> Perturbation:
    """LPL at the logits: raises the losses of badly learnt (or rare) classes, lowers those of the others.

    Args:
      bound: ε_c: a number, [C], `varied()`, `varied_by_frequency()`, or a schedule of the step. The paper searches 0.1…0.5 with
        step_size 0.01…0.03 on balanced data, and 1.5…5 with 0.1…0.3 on long-tailed data.
      step_size: α.
      split: which classes are raised: "accuracy" (q̄_c ≤ τ, running mean over steps), "frequency" (rank > τ·C), or a Split.
        q̄_c comes from the logits as they reach this link: adjusted ones in chain(logit_adjustment(), lpl()).
      tau: threshold of a split given by name.
      direction: overrides the split: +1, −1 or [C].
      project: also keep each class's delta in the l2 ball of radius ε_c.
      max_steps: static limit of the number of steps; None: read off bound and step_size.

    Metrics: raised, lowered (numbers of classes), inner_evaluations.
    """
    check_bound("lpl", bound)
    max_steps = _loop_length(largest(bound, default=DEFAULT_BOUND), step_size, max_steps)
    split = as_split("lpl", split, tau=tau, direction=direction)

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        state = split.update(state, Clean(flow.value, flow.labels, flow.targets), context)
        signs = split.direction(state, context)
        eps = radius(bound, default=DEFAULT_BOUND, split=split, state=state, context=context, site=context.site)
        delta, _ = pgd(
            rest, flow.value, flow.labels, context.num_classes, direction=signs, step_size=step_size,
            num_steps=lpl_steps(eps, step_size), bound=eps if project else jnp.inf, step="raw", max_steps=max_steps,
            axis_name=context.axis_name,
        )  # fmt: skip
        metrics = {"raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0), "inner_evaluations": jnp.int32(max_steps)}
        return flow._replace(value=flow.value + delta), state, metrics

    return Perturbation("logits", split.init, apply, search=True, needs=needs(bound, split))
