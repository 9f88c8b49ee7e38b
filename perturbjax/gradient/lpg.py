r"""Learning to perturb gradients (LPG): one perturbation of the logit gradient h = ∂ℓ/∂u per class, in the backward pass only.

    form="shift"   h̃_i = h_i + s_c · ε_c · h̄_c/‖h̄_c‖          (eqs. 9, 13–14)
    form="scale"   h̃_i = h_i · (1 + s_c · ε_c/‖h̄_c‖)           (eq. 15, per sample)

h̄_c is the class's mean logit gradient, taken before the 1/B of a mean loss. s_c = +1 amplifies the class's gradient, −1 dampens
it; literally eq. 14 turns the gradient round where ε_c > ‖h̄_c‖, the minimiser of eq. 12 on that line stops at zero: `clamp`.
The forward pass is untouched. Source: "Learning to Perturb Gradients" (LPG), sections 3.4–3.6.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.bound import Bound, check_bound, needs, radius
from perturbjax.checks import check_choice, check_logits_labels
from perturbjax.classes import AxisName, class_count, class_mean, wide
from perturbjax.core import Context, Flow, Perturbation, Rest, method
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
    axis_name: AxisName = None,
) -> jax.Array:
    """h̃ − h: [B, C], in at least float32, a constant for the gradient; zero where the class's mean gradient is zero.

    Args:
      logit_gradients: h [B, C] per example (softmax(u) − y for cross entropy), before any division by the batch size.
      labels: [B] integers in 0..C-1; others (padding) get zeros.
      direction: s_c, +1 amplifies, −1 dampens, 0 leaves alone; a number or [C].
      bound: ε_c, in units of the gradient's l2 norm; a number or [C]. Both may be traced.
      form: one shift per class, or a factor of each sample's own gradient.
      clamp: dampening stops at a zero class mean (shift) or a zero gradient (scale).
      axis_name: mapped axis to take class means over.

    >>> h, y = jnp.array([[-0.6, 0.6], [-0.2, 0.2]]), jnp.array([0, 0])
    >>> print(lpg_delta(h, y, direction=1.0, bound=0.1).round(3))
    [[-0.071  0.071]
     [-0.071  0.071]]
    """
    check_logits_labels("lpg_delta", logit_gradients, labels)
    check_choice("lpg_delta", "form", form, ("shift", "scale"))
    h = wide(jax.lax.stop_gradient(logit_gradients))
    num_classes = h.shape[-1]
    mean = class_mean(h, labels, num_classes, axis_name=axis_name)
    norm = group_norm(mean)
    amount = jnp.broadcast_to(jnp.asarray(direction * bound, h.dtype), [num_classes])
    if clamp:
        amount = jnp.maximum(amount, -norm)
    own = lambda x: x.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)  # padding has no class: zero
    if form == "shift":
        return own(amount[:, None] * unit(mean))
    factor = jnp.where(norm > 0, amount / jnp.where(norm > 0, norm, 1), 0)
    return h * own(factor)[:, None]


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
) -> Perturbation:
    """LPG in closed form: amplifies the gradients of badly learnt (or rare) classes, dampens those of the others.

    Args:
      bound: ε_c in units of ‖h‖₂ (at most √2): a number, [C], `varied()`, or a schedule of the step.
      form, clamp: see `lpg_delta`.
      split, tau, direction: which classes are amplified. By name: "accuracy" (running top-1 accuracy below τ), "frequency"
        (N_c < τ, the median), "variance" (noisy classes are dampened), each over whole epochs (Algorithm 1).

    Metrics: raised, lowered (numbers of classes); bound_term = Σ_c (N_c/N)·ε_c, the last term of Proposition 2.
    """
    check_bound("lpg", bound)
    check_choice("lpg", "form", form, ("shift", "scale"))
    split = as_split(
        "lpg", split, tau=tau, direction=direction,
        accuracy=dict(measure="top1", update="epoch"), frequency=dict(rule="count", tau="median"),
    )  # fmt: skip

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        state = split.update(state, Clean(flow.trace["logits"], flow.labels, flow.targets), context)
        signs = split.direction(state, context)
        eps = radius(bound, default=DEFAULT_BOUND, split=split, state=state, context=context)
        delta = lpg_delta(
            flow.value, flow.labels, direction=signs, bound=eps, form=form, clamp=clamp, axis_name=context.axis_name
        )
        counts = context.class_counts
        if counts is None:
            counts = class_count(flow.labels, context.num_classes, axis_name=context.axis_name)
        share = counts.astype(jnp.float32) / jnp.maximum(counts.sum(), 1).astype(jnp.float32)
        metrics = {"raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0), "bound_term": jnp.sum(share * eps)}
        return flow._replace(value=flow.value + delta), state, metrics

    return Perturbation("logit_gradient", split.init, apply, needs=needs(bound, split))
