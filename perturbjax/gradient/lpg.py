r"""Learning to perturb gradients (LPG): one perturbation of the logit gradient h = ∂ℓ/∂u per class, in the backward pass only.

    form="shift"   h̃_i = h_i + s_c · ε_c · h̄_c/‖h̄_c‖          (eqs. 9, 13–14)
    form="scale"   h̃_i = h_i · (1 + s_c · ε_c/‖h̄_c‖)           (eq. 15, per sample)

h̄_c is the class's mean logit gradient, taken before the 1/B of a mean loss. s_c = +1 amplifies the class's gradient, −1 dampens
it; literally eq. 14 turns the gradient round where ε_c > ‖h̄_c‖, the minimiser of eq. 12 on that line stops at zero: `clamp`.
inference="pgd" searches all of the ball for the δ that makes the class's parameter gradient largest or smallest (lpg_pgd.py).
The forward pass is untouched. Source: "Learning to Perturb Gradients" (LPG), sections 3.4–3.6; granularity="sample": section 5.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.bound import Bound, check_bound, needs, radius
from perturbjax.checks import check_choice, check_number, check_samples
from perturbjax.classes import AxisName, class_count, wide
from perturbjax.gradient.lpg_generalization import lpg_bound_term
from perturbjax.gradient.lpg_groups import Granularity, lpg_groups
from perturbjax.gradient.lpg_pgd import STEPS, Step, full_search, head_search
from perturbjax.link import Context, Flow, Perturbation, Rest, clean_logits
from perturbjax.method import method
from perturbjax.projection import group_norm, unit
from perturbjax.split import Clean, Split, as_split

DEFAULT_BOUND = 0.1


def lpg_delta(
    logit_gradients: jax.Array,
    labels: jax.Array,
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    form: Literal["shift", "scale"] = "shift",
    clamp: bool = True,
    granularity: Granularity = "category",
    axis_name: AxisName = None,
) -> jax.Array:
    """h̃ − h: [B, C], in at least float32, a constant for the gradient; zero where the class's mean gradient is zero.

    Args:
      logit_gradients: h [B, C] per example (softmax(u) − y for cross entropy), before any division by the batch size.
      labels: [B] integers in 0..C-1; others (padding) get zeros in jit.
      direction: s_c, +1 amplifies, −1 dampens, 0 leaves alone; a number or [C].
      bound: ε_c, in units of the gradient's l2 norm; a number or [C]. Both may be traced.
      form: one shift per class, or a factor of each sample's own gradient.
      clamp: dampening stops at a zero class mean (shift) or a zero gradient (scale).
      granularity: "sample" takes each sample's own h_i for h̄_c; then both forms are the same.
      axis_name: mapped axis to take class means over.

    >>> h, y = jnp.array([[-0.6, 0.6], [-0.2, 0.2]]), jnp.array([0, 0])
    >>> print(lpg_delta(h, y, direction=1.0, bound=0.1).round(3))
    [[-0.071  0.071]
     [-0.071  0.071]]
    """
    check_samples("lpg_delta", logit_gradients, labels, what="logit gradients")
    check_choice("lpg_delta", "form", form, ("shift", "scale"))
    return _closed(
        logit_gradients, labels, direction=direction, bound=bound, form=form, clamp=clamp, granularity=granularity,
        axis_name=axis_name,
    )  # fmt: skip


def _closed(
    logit_gradients: jax.Array,
    labels: jax.Array,
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    form: Literal["shift", "scale"],
    clamp: bool,
    granularity: Granularity,
    axis_name: AxisName,
) -> jax.Array:
    """`lpg_delta` without its checks: in training, what isn't finite has to reach the loss, and padding to stay out of it."""
    h = wide(jax.lax.stop_gradient(logit_gradients))
    num_classes = h.shape[-1]
    groups = lpg_groups(labels, num_classes, granularity, axis_name=axis_name)
    mean = groups.mean(h)
    norm = group_norm(mean)
    amount = groups.of_class(jnp.broadcast_to(jnp.asarray(direction * bound, h.dtype), [num_classes]))
    if clamp:
        amount = jnp.maximum(amount, -norm)
    if form == "shift":
        return groups.spread(amount[:, None] * unit(mean))
    factor = jnp.where(norm > 0, amount / jnp.where(norm > 0, norm, 1), 0)
    return h * groups.spread(factor)[:, None]


@method(
    target="logit gradient", direction=(+1, -1), inference="adversarial", granularity="category",
    cite="LPG", off=dict(bound=0.0),
)  # fmt: skip
def lpg(
    *,
    bound: Bound = DEFAULT_BOUND,
    form: Literal["shift", "scale"] = "shift",
    split: Split | Literal["accuracy", "frequency", "variance", "all"] = "accuracy",
    tau: ArrayLike | str | None = None,
    direction: ArrayLike | None = None,
    clamp: bool = True,
    inference: Literal["closed", "pgd"] = "closed",
    jacobian: Literal["head", "full"] = "head",
    num_steps: int = 3,
    step_size: ArrayLike | None = None,
    step: Step = "sign",
    granularity: Granularity = "category",
) -> Perturbation:
    """LPG: amplifies the gradients of badly learnt (or rare) classes, dampens those of the others.

    Args:
      bound: ε_c in units of ‖h‖₂ (at most √2): a number, [C], `varied()`, or a curriculum: a schedule of the step, or over the run
        `linear(first=0.1, last=0)`, `cosine(...)`.
      form, clamp: see `lpg_delta`; with "pgd", clamp is that of `lpg_head_delta`.
      split, tau, direction: which classes are amplified. By name: "accuracy" (running top-1 accuracy below τ), "frequency"
        (N_c < τ, the median), "variance" (noisy classes are dampened), each over whole epochs (Algorithm 1); for another
        statistic give a Split, such as by_accuracy(update="step"). After LPA or LPL the logits are those of their clean pass; after
        methods that search at the input (adversarial training) those of the perturbed samples.
      inference: "closed", along h̄_c; or "pgd", eqs. 16–17.
      jacobian: whose parameters count for "pgd": those of the last linear layer ("head": matrix products only; its bias counts, unless
        the model's `head` gives b = None), or of the whole network ("full": exact, with room for C gradients, for small nets).
      num_steps, step_size, step: T, κ (None: 2ε_c/T) and "sign" or "unit" steps of "pgd".
      granularity: "category", or "sample": every sample its own δ, with its class's direction and bound.

    Metrics: raised, lowered (numbers of classes); bound_term = Σ_c (N_c/N)·ε_c, the last term of Proposition 2; with
    jacobian="full" inner_evaluations, pullbacks with their pushforwards, over all classes.
    """
    check_bound("lpg", bound)
    check_choice("lpg", "form", form, ("shift", "scale"))
    check_choice("lpg", "inference", inference, ("closed", "pgd"))
    check_choice("lpg", "jacobian", jacobian, ("head", "full"))
    check_choice("lpg", "step", step, STEPS)
    check_choice("lpg", "granularity", granularity, ("category", "sample"))
    check_number("lpg", low=1, num_steps=num_steps)
    check_number("lpg", low=0, step_size=step_size)
    if inference == "closed" and (jacobian != "head" or step_size is not None or step != "sign"):
        given = f"jacobian={jacobian!r}, step_size={step_size}, step={step!r}"
        raise ValueError(f"lpg needs inference='pgd' for settings of its search, got {given}. Write inference='pgd'.")
    if inference == "pgd" and form != "shift":
        raise ValueError(f"lpg needs form='shift' with inference='pgd', got {form!r}. A factor is for inference='closed'.")
    split = as_split(
        "lpg", split, tau=tau, direction=direction,
        accuracy=dict(measure="top1", update="epoch"), frequency=dict(rule="count", tau="median"),
    )  # fmt: skip
    reads_head = inference == "pgd" and jacobian == "head"

    def find(flow: Flow, context: Context, **place: Any) -> jax.Array:
        place |= dict(clamp=clamp, granularity=granularity, axis_name=context.axis_name)
        if inference == "closed":
            return _closed(flow.value, flow.labels, form=form, **place)
        place |= dict(num_steps=num_steps, step_size=step_size, step=step)
        if jacobian == "full":
            return full_search(flow.value, flow.labels, context.pullback(), **place)
        bias = context.head()[1] is not None
        return head_search(flow.value, flow.trace["features"], flow.labels, bias=bias, **place)

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        clean = Clean(clean_logits(flow, flow.trace["logits"]), flow.labels, flow.targets)
        state = split.update(state, clean, context)
        signs = split.direction(state, context)
        eps = radius(bound, default=DEFAULT_BOUND, split=split, state=state, context=context)
        delta = find(flow, context, direction=signs, bound=eps)
        counts = context.class_counts
        if counts is None:
            counts = class_count(flow.labels, context.num_classes, axis_name=context.axis_name)
        metrics = {"raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0), "bound_term": lpg_bound_term(eps, counts)}
        if jacobian == "full":
            groups = context.num_classes if granularity == "category" else flow.labels.shape[0]
            metrics["inner_evaluations"] = jnp.int32((num_steps + 1) * groups)
        return flow._replace(value=flow.value + delta), state, metrics

    needed = needs(bound, split) + (("features", "head") if reads_head else ())
    return Perturbation("logit_gradient", split.init, apply, needs=needed)
