r"""Logit perturbation learning (LPL): one perturbation of the logits per class, found by gradient steps.

    u⁰ = u,   uᵏ⁺¹ = uᵏ + s_c · α · mean_{j: y_j = c}(softmax(uᵏ_j) − ŷ_j)   for k < K_c = ⌊ε_c/α⌋,   loss at u^K

s_c = +1 raises the loss of class c, −1 lowers it (eqs. 11–17, Algorithm 2); the bound ε_c sets the number of steps, fixed or
varied by class (eqs. 18–19). This is Algorithm 2 as printed. What the authors' code does otherwise are settings: each class's step
divided by a norm, the sign anew at each step, its own numbers of steps (lpl_steps.py), the outer gradient through the steps.
Source: Li, Su, Wu, Zhang, "Logit Perturbation", AAAI 2022; github.com/limengyang1992/lpl at 9fe33e8.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.bound import Bound, check_bound, largest, needs, needs_accuracy, radius
from perturbjax.checks import check_choice, check_number, check_samples, is_traced
from perturbjax.classes import AxisName, at_least_float32, class_mean, number, wide
from perturbjax.inference.pgd import UNROLLED, pgd
from perturbjax.link import Context, Flow, Perturbation, Rest, clean_logits, searched_from
from perturbjax.logit.lpl_steps import HeadTailSteps, ProportionalSteps, Steps, class_steps, largest_steps, steps_need
from perturbjax.method import method
from perturbjax.projection import group_norm, project, unit
from perturbjax.split import Clean, Split, as_split, by_accuracy

DEFAULT_BOUND = 1.0
MOST_STEPS = 10_000  # more is a slip of the pen, and a loop that never ends
Normalize = Literal["none", "row", "column"]
NORMALIZE = ("none", "row", "column")


def lpl_delta(
    logits: jax.Array,
    labels: jax.Array,
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    step_size: ArrayLike,
    normalize: Normalize = "none",
    max_steps: int | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The perturbation itself: [B, C], equal within a class; no gradient flows through it into the logits.

    Args:
      logits: [B, C], any float type (computed in at least float32).
      labels: [B] integers in 0..C-1; others (padding) get zeros in jit.
      direction: s_c, +1 raises the loss of class c, −1 lowers it; a number or [C].
      bound: ε_c in units of step_size·steps; a number or [C]. step_size: α, a number or [C]. All three may be traced.
      normalize: of the class means before the step, see `lpl`.
      max_steps: static limit of K_c; None: read off bound and step_size, which must not be traced then.
      axis_name: mapped axis to take class means over; None: this is the whole batch.

    Raises:
      ValueError: shapes that don't fit, other labels or logits that aren't finite (outside a trace), a loop length that can't be
        known, or a max_steps too small for bound and step_size.

    >>> u, y = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    >>> print(lpl_delta(u, y, direction=jnp.array([1.0, -1.0]), bound=0.2, step_size=0.1).round(3))
    [[-0.024  0.024]
     [-0.053  0.053]]
    """
    check_samples("lpl_delta", logits, labels)
    check_choice("lpl_delta", "normalize", normalize, NORMALIZE)
    logits = wide(logits)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return _search(
        _cross_entropy(targets), logits, labels, logits.shape[-1], signs=direction, step_size=step_size,
        num_steps=lpl_steps(bound, step_size), bound=jnp.inf, normalize=normalize,
        max_steps=_loop_length(_needed(None if is_traced(bound) else bound, step_size), max_steps), axis_name=axis_name,
    )  # fmt: skip


def lpl_steps(bound: ArrayLike, step_size: ArrayLike) -> jax.Array:
    """K_c = ⌊ε_c/α⌋ (eq. 19), with a guard: 0.9/0.3 is 2.9999998 in float32, and is three steps."""
    bound = number(bound)
    return jnp.floor(bound / jnp.asarray(step_size, bound.dtype) + 1e-4)


def _cross_entropy(targets: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda u: -jnp.sum(targets.astype(u.dtype) * jax.nn.log_softmax(u, axis=-1), axis=-1)


def _normalized(mean: jax.Array, how: Normalize) -> jax.Array:
    """The class means [C, C] by the l2 norm of each row, or of the column of the same number (the code); zero stays zero."""
    if how == "column":
        norm = group_norm(mean.T)
        return mean / jnp.where(norm > 0, norm, 1)[:, None]
    return unit(mean) if how == "row" else mean


def _search(
    loss_of: Callable[[jax.Array], jax.Array],
    value: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    signs: ArrayLike | Callable[[jax.Array], jax.Array],
    step_size: ArrayLike,
    num_steps: ArrayLike,
    bound: ArrayLike,
    normalize: Normalize,
    max_steps: int,
    axis_name: AxisName,
    twice: bool = False,
    through: bool = False,
) -> jax.Array:
    """δ [B, C]. `signs` as a function of the logits is asked at every step; `twice` and `through` are described in `lpl`.

    The paper's form is the library's search. The code's lets all classes walk on and picks each one's place after its own number of
    steps, which is another place where classes depend on each other: by the norms of columns, or by signs asked at every step.
    """
    if normalize != "column" and not (callable(signs) or twice or through):
        delta, _ = pgd(
            loss_of, value, labels, num_classes, direction=signs, step_size=step_size, num_steps=num_steps, bound=bound,
            step="unit" if normalize == "row" else "raw", max_steps=max_steps, axis_name=axis_name,
        )  # fmt: skip
        return delta
    dtype = at_least_float32(value.dtype)
    hold = (lambda x: x) if through else jax.lax.stop_gradient
    of_class = lambda x: jnp.broadcast_to(jnp.asarray(x, dtype), [num_classes])
    spread = lambda delta: delta.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    value, limit = hold(value.astype(dtype)), of_class(bound)
    steps = jnp.minimum(of_class(num_steps), max_steps)

    def walk(places, k):
        delta, kept = places
        point = value + spread(delta)
        slope = class_mean(jax.grad(lambda u: loss_of(u).sum())(point), labels, num_classes, axis_name=axis_name)
        rate = of_class(signs(point) if callable(signs) else signs) * of_class(step_size)
        step = rate[:, None] * hold(_normalized(slope.astype(dtype), normalize))
        after = project(delta + step, limit)
        kept = jnp.where((k + 1 == steps)[:, None], after, kept)
        return (project(after + step, limit) if twice else after, kept), None

    zeros = jnp.zeros([num_classes, num_classes], dtype)
    (_, kept), _ = jax.lax.scan(walk, (zeros, zeros), jnp.arange(max_steps, dtype=dtype))
    return spread(kept)


def _needed(most: Any, step_size: Any, num_steps: Steps | None = None) -> float | None:
    """The largest number of steps that will occur, for a largest bound or a rule; None if it can't be known here."""
    check_number("lpl", low=0, open_low=True, step_size=step_size)
    if num_steps is not None:
        return largest_steps(num_steps)
    if most is None or is_traced(step_size):
        return None
    if not np.isfinite(np.asarray(most)).all():
        raise ValueError(f"lpl needs a finite bound, got {most}. It sets the number of steps, floor(bound / step_size).")
    steps = float(np.floor(np.max(np.asarray(most)) / np.min(np.asarray(step_size)) + 1e-4))
    if steps > MOST_STEPS:
        raise ValueError(
            f"lpl needs bound / step_size <= {MOST_STEPS} steps, got {steps:g}. Lower the bound, or raise step_size."
        )
    return steps


def _loop_length(needed: float | None, max_steps: int | None) -> int:
    """Static loop length: max_steps, or for what is needed 10, 20, 40 …, so that nearby bounds share one compiled program."""
    if needed is None:
        if max_steps is not None:
            return int(max_steps)
        raise ValueError(
            "lpl needs max_steps when bound, step_size or num_steps is traced or a schedule, got None: the loop's length is part "
            "of the program. Pass max_steps=10, the largest floor(bound / step_size) that will occur."
        )
    if max_steps is not None:
        if max_steps < needed:
            raise ValueError(
                f"lpl needs max_steps >= floor(bound / step_size) = {needed:g}, got {max_steps}. "
                f"Pass max_steps={needed:g}, or leave it out."
            )
        return int(max_steps)
    length = UNROLLED
    while length < needed:
        length *= 2
    return length


def _resolve(settings: dict) -> dict:
    most = largest(settings["bound"], default=DEFAULT_BOUND)
    needed = _needed(most, settings["step_size"], settings.get("num_steps"))
    return {"max_steps": _loop_length(needed, settings["max_steps"])}


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
    num_steps: Steps | None = None,
    normalize: Normalize = "none",
    sign: Literal["fixed", "each_step"] = "fixed",
    gradient: Literal["stop", "through"] = "stop",
    search: Literal["rest", "alone"] = "rest",
) -> Perturbation:
    """LPL at the logits: raises the losses of badly learnt (or rare) classes, lowers those of the others.

    Args:
      bound: ε_c: a number, [C], `varied()`, `varied_by_frequency()`, a schedule of the step, or over the run `linear()`, `cosine()`.
        On balanced data the paper searches ε in {0.1, 0.2, 0.3, 0.4}, or Δε in {0.1, 0.2}, with step_size 0.01…0.03, and calls bounds of
        0.1…0.5 stable; on long-tailed data Δε in {1.5, 2.5, 5} with ε = 0 (`varied_by_frequency`) and step_size 0.1…0.3.
      step_size: α, a number or [C].
      split: which classes are raised: "accuracy" (q̄_c ≤ τ, running mean over steps), "frequency" (rank > τ·C), or a Split, such as
        by_accuracy(update="epoch"). q̄_c comes from the logits as they reach this link: adjusted ones in
        chain(logit_adjustment(), lpl()), plain ones in chain(lpl(), logit_adjustment()). After an LPA, or a method that puts the label
        into the logits (LogPert, MixPert, LDAM, ISDA …), it comes from the pass without that one; after methods that search at the
        input (adversarial training) from the perturbed samples.
      tau: threshold of a split given by name.
      direction: overrides the split: +1, −1 or [C].
      project: also keep each class's delta in the l2 ball of radius ε_c.
      max_steps: static limit of the number of steps; None: read off bound and step_size, or num_steps.
      num_steps: K_c instead of ⌊ε_c/α⌋: a number, [C], or a rule of the authors' code, `head_tail_steps()`, `proportional_steps()`.

    What the authors' code does otherwise:
      normalize: divides each class's mean gradient by its own l2 norm ("row"), or by that of the *column* of the same number in the
        matrix of class means ("column": the code), so that a step moves by about α.
      sign: "each_step" asks the split again after every step, at the logits moved so far (the balanced code, with
        split=by_accuracy(update="batch", over="all")).
      gradient: "through" lets the outer gradient flow through the steps (the long-tail code); otherwise the delta is a constant.
      search: the steps climb the loss as the later links leave it ("rest"), or the cross entropy of the logits here ("alone"): with
        chain(lpl(search="alone"), logit_adjustment()) the perturbation comes first and the adjustment after it.

    Metrics: raised, lowered (numbers of classes), inner_evaluations.
    """
    check_bound("lpl", bound)
    check_choice("lpl", "normalize", normalize, NORMALIZE)
    check_choice("lpl", "sign", sign, ("fixed", "each_step"))
    check_choice("lpl", "gradient", gradient, ("stop", "through"))
    check_choice("lpl", "search", search, ("rest", "alone"))
    check_number("lpl", low=0, num_steps=None if isinstance(num_steps, HeadTailSteps | ProportionalSteps) else num_steps)
    max_steps = _loop_length(_needed(largest(bound, default=DEFAULT_BOUND), step_size, num_steps), max_steps)
    beside = {"accuracy": by_accuracy()} if needs_accuracy(bound) else {}
    split = as_split("lpl", split, tau=tau, direction=direction, frequency=beside)
    twice = isinstance(num_steps, ProportionalSteps) and num_steps.counted == "twice"

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        clean, before = lambda u: Clean(u, flow.labels, flow.targets), state
        state = split.update(state, clean(clean_logits(flow, flow.value)), context)
        signs = split.direction(state, context)
        eps = radius(bound, default=DEFAULT_BOUND, split=split, state=state, context=context, site=context.site)
        steps = lpl_steps(eps, step_size)
        if num_steps is not None:
            steps = class_steps(num_steps, split=split, state=state, context=context)
        again = lambda u: split.direction(split.update(before, clean(u), context), context)
        delta = _search(
            rest if search == "rest" else _cross_entropy(flow.targets), flow.value, flow.labels, context.num_classes,
            signs=again if sign == "each_step" else signs, step_size=step_size, num_steps=steps,
            bound=eps if project else jnp.inf, normalize=normalize, max_steps=max_steps, axis_name=context.axis_name,
            twice=twice, through=gradient == "through",
        )  # fmt: skip
        if num_steps is None or project:  # a bound that is nan allows no step, and would go on unseen
            broken = jnp.isnan(eps).at[flow.labels].get(mode="fill", fill_value=False, wrap_negative_indices=False)
            delta = jnp.where(broken[:, None], jnp.nan, delta)
        metrics = {"raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0), "inner_evaluations": jnp.int32(max_steps)}
        end = rest.flow(jax.lax.stop_gradient(flow.value))[1]  # for statistics of later links; unused, the compiler drops it
        flow = searched_from(flow, clean_logits(end, end.trace["logits"]))
        return flow._replace(value=flow.value + delta), state, metrics

    needed = tuple(dict.fromkeys(needs(bound, split) + steps_need(num_steps)))
    return Perturbation("logits", split.init, apply, search=True, needs=needed)
