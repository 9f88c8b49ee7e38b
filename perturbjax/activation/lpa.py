r"""Learning to perturb activations (LPA): one perturbation per class at a hidden site, found by projected gradient steps.

    δ_c ← Π_{‖δ‖₂ ≤ ε_c}( δ_c + s_c · κ_c · ḡ_c/‖ḡ_c‖ ),    ḡ_c = mean_{j: y_j = c} ∂ℓ_j/∂a_j,    T steps, κ_c = 2ε_c/T

Only the layers after the site rerun (eqs. 8–11, 14–15; Algorithm 1). The equations print the raw gradient, the algorithm an argmax
in the ball: the step is normalised, so that ε means the same at every layer; `step="raw"` is the literal equation. At the
logits, with raw steps and no projection, LPA is LPL. Source: "Learning to Perturb Activations" (LPA), section 3.4.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.bound import Bound, LayerScaled, check_bound, layer_scaled, needs, radius
from perturbjax.checks import check_choice, check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method
from perturbjax.inference.pgd import pgd
from perturbjax.split import Clean, Split, as_split

DEFAULT_BOUND = 0.2


@method(
    target="activation", direction=(+1, -1), inference="adversarial", granularity="category",
    cite="LPA", off=dict(bound=0.0),
)  # fmt: skip
def lpa(
    *,
    bound: Bound = DEFAULT_BOUND,
    site: str = "last_stage",
    num_steps: int = 3,
    step_size: ArrayLike | None = None,
    step: Literal["unit", "raw", "sign"] = "unit",
    split: Split | Literal["accuracy", "frequency", "variance", "all"] = "accuracy",
    tau: ArrayLike | str | None = None,
    direction: ArrayLike | None = None,
    beta: ArrayLike = 0.7,
    project: bool = True,
) -> Perturbation:
    """LPA at one site: moves the activations of each class together, up or down its loss.

    Args:
      bound: ε_c at the logits' level, in l2 over the whole flattened activation: a number, [C], `varied()`, a schedule. The paper
        finds 0.05…0.3 stable.
      site: any site of the model; "last_stage" is the one before the pooling.
      num_steps: T.
      step_size: κ; None: 2ε_c^(l)/T, per class.
      step: "unit" (default), "raw" (eqs. 10–11) or "sign" steps.
      split, tau, direction: which classes are raised, as in `lpl`; the accuracy is taken over whole epochs (Algorithm 1).
      beta: β of the layer scaling γ_l = β^(L−l); 1 switches it off. A `layer_scaled` bound brings its own.
      project: keep δ_c in the ball.

    Metrics: raised, lowered (numbers of classes), inner_evaluations.
    """
    check_bound("lpa", bound)
    check_number("lpa", low=0, step_size=step_size)
    check_number("lpa", low=1, num_steps=num_steps)
    check_choice("lpa", "step", step, ("unit", "raw", "sign"))
    split = as_split("lpa", split, tau=tau, direction=direction, accuracy=dict(measure="top1", update="epoch"))
    scaled = bound if isinstance(bound, LayerScaled) else layer_scaled(bound, beta=beta)

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        def after(end: Flow) -> Any:
            return split.update(state, Clean(end.trace["logits"], end.labels, end.targets), context)

        def eps(losses, end: Flow):
            return radius(scaled, default=DEFAULT_BOUND, split=split, state=after(end), context=context, site=context.site)

        rate = step_size if step_size is not None else lambda losses, end: 2 * eps(losses, end) / num_steps
        delta, search = pgd(
            rest.flow, flow.value, flow.labels, context.num_classes, has_aux=True,
            direction=lambda losses, end: split.direction(after(end), context), step_size=rate, num_steps=num_steps,
            bound=eps if project else jnp.inf, step=step, axis_name=context.axis_name,
        )  # fmt: skip
        state = after(search.aux)
        signs = split.direction(state, context)
        metrics = {"raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0), "inner_evaluations": jnp.int32(num_steps)}
        return flow._replace(value=flow.value + delta), state, metrics

    return Perturbation(site, split.init, apply, search=True, needs=needs(bound, split))
