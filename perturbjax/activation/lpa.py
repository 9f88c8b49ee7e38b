r"""Learning to perturb activations (LPA): one perturbation per class at a hidden site, found by projected gradient steps.

    δ_c ← Π_{‖δ‖₂ ≤ ε_c}( δ_c + s_c · κ_c · ḡ_c/‖ḡ_c‖ ),    ḡ_c = mean_{j: y_j = c} ∂ℓ_j/∂a_j,    T steps, κ_c = 2ε_c/T

Only the layers after the site rerun (eqs. 8–11, 14–15; Algorithm 1). The equations print the raw gradient, the algorithm an argmax
in the ball: the step is normalised, so that ε means the same at every layer; `step="raw"` is the literal equation. At the
logits, with raw steps and no projection, LPA is LPL. Low rank (eq. 12): lpa_rank.py; several candidate sites (eq. 13): lpa_sites.py.
Source: "Learning to Perturb Activations" (LPA), section 3.4.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.activation.lpa_amplification import amplification
from perturbjax.activation.lpa_rank import check_rank, first_span, rank_at
from perturbjax.activation.lpa_sites import site_links
from perturbjax.bound import Bound, LayerScaled, check_bound, layer_scaled, needs, radius
from perturbjax.checks import check_choice, check_number
from perturbjax.classes import AxisName, class_count, class_mean, wide
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest, clean_logits, searched_from
from perturbjax.method import method
from perturbjax.projection import group_norm
from perturbjax.split import Clean, Split, as_split

DEFAULT_BOUND = 0.2


def norm_expansion(
    value: jax.Array, delta: jax.Array, labels: jax.Array, num_classes: int, *, axis_name: AxisName = None
) -> jax.Array:
    """E_c‖a + δ‖/E_c‖a‖ of each class: [C], from value and delta [B, ...]; more than 1: expansive (eq. 6); 1 for an absent class.

    >>> a = jnp.array([[3.0, 4.0], [0.0, 5.0]])
    >>> print(norm_expansion(a, a, jnp.array([0, 0]), 2))
    [2. 1.]
    """
    a, moved = wide(value), wide(value) + wide(delta)
    norms = class_mean(jnp.stack([group_norm(a), group_norm(moved)], axis=1), labels, num_classes, axis_name=axis_name)
    return jnp.where(norms[:, 0] > 0, norms[:, 1] / jnp.where(norms[:, 0] > 0, norms[:, 0], 1), 1)


@method(
    target="activation", direction=(+1, -1), inference="adversarial", granularity="category",
    cite="LPA", off=dict(bound=0.0), resolve_structure=lambda settings: {"rank": settings["rank"]},
)  # fmt: skip
def lpa(
    *,
    bound: Bound = DEFAULT_BOUND,
    site: str | tuple[str, ...] = "last_stage",
    num_steps: int = 3,
    step_size: ArrayLike | None = None,
    step: Literal["unit", "raw", "sign"] = "unit",
    split: Split | Literal["accuracy", "frequency", "variance", "all"] = "accuracy",
    tau: ArrayLike | str | None = None,
    direction: ArrayLike | None = None,
    beta: ArrayLike = 0.7,
    project: bool = True,
    rank: int | float | None = None,
    every: int = 1,
) -> Perturbation | tuple[Perturbation, ...]:
    """LPA at one site: moves the activations of each class together, up or down its loss.

    Args:
      bound: ε_c at the logits' level, in l2 over the whole flattened activation: a number, [C], `varied()`, a schedule. The paper
        finds 0.05…0.3 stable.
      site: any site of the model; "last_stage" is the one before the pooling. Several, ("stage1", "stage2"): candidates, of which the
        one is used whose perturbation changes the loss most (eq. 13); with vmapped seeds all of them are paid for. To perturb at
        several sites at once, chain one lpa for each.
      num_steps: T.
      step_size: κ; None: 2ε_c^(l)/T, per class.
      step: "unit" (default), "raw" (eqs. 10–11) or "sign" steps.
      split, tau, direction: which classes are raised, as in `lpl`; the accuracy is taken over whole epochs (Algorithm 1), of the clean
        pass, in which neither this perturbation nor those of LPA before it in a chain are; LPL and LPG after it take theirs from the
        same pass. What other methods have done to the samples (adversarial training, mixup) is in it.
      beta: β of the layer scaling γ_l = β^(L−l); 1 switches it off. A `layer_scaled` bound brings its own.
      project: keep δ_c in the ball.
      rank: δ_c in the span of so many singular vectors of the class's gradient (eq. 12): a number k, or a share of the site's
        channels: the paper takes 0.25. None: full rank. It restricts the perturbation; it saves no time.
      every: with several sites: epochs from one comparison of them to the next.

    Metrics, numbers all (by class: `norm_expansion`): raised, lowered (numbers of classes); expansion_raised, expansion_lowered, the
    mean of ‖ã_c‖/‖a_c‖ over those in the batch (1: none; raising a loss need not expand); amplification, the mean over the samples of
    the logits' change over ‖δ‖ at the search's last evaluation, so before its last step (0 with num_steps=1; its bounds:
    `local_amplification`, `lipschitz_product`); inner_evaluations; with several sites `site`, the number of the chosen one, from 0, and
    effect_stage1 …, what they were compared by.
    """
    check_bound("lpa", bound)
    check_number("lpa", low=0, step_size=step_size)
    check_number("lpa", low=1, num_steps=num_steps, every=every)
    check_choice("lpa", "step", step, ("unit", "raw", "sign"))
    check_rank(rank)
    if rank is not None and step == "sign":
        raise ValueError("lpa needs step='unit' or 'raw' with a rank, got 'sign': signs are of full rank. Write step='unit'.")
    sites = (site,) if isinstance(site, str) else tuple(site)
    if not sites or len(set(sites)) < len(sites):
        raise ValueError(f"lpa needs one site or several different ones, got {site!r}. Write site=('stage1', 'stage2').")
    split = as_split("lpa", split, tau=tau, direction=direction, accuracy=dict(measure="top1", update="epoch"))
    scaled = bound if isinstance(bound, LayerScaled) else layer_scaled(bound, beta=beta)

    def check(context: Context) -> None:
        assert context.site_shapes is not None and context.site is not None
        rank_at(rank, context.site_shapes[context.site][1:], context.num_classes, context.site)

    def init(context: Context) -> Any:
        check(context)
        return split.init(context)

    def search(flow: Flow, rest: Rest, state: Any, context: Context, counted: Any):
        """(delta [B, ...], clean losses [B] and logits [B, C], state of the split, metrics); `counted`: the state has this batch already."""

        def after(end: Flow) -> Any:
            new = split.update(state, Clean(clean_logits(end, end.trace["logits"]), end.labels, end.targets), context)
            return new if counted is False else jax.tree.map(lambda old, new: jnp.where(counted, old, new), state, new)

        def eps(losses, end: Flow):
            return radius(scaled, default=DEFAULT_BOUND, split=split, state=after(end), context=context, site=context.site)

        k = rank_at(rank, flow.value.shape[1:], context.num_classes, str(context.site))
        rate = step_size if step_size is not None else lambda losses, end: 2 * eps(losses, end) / num_steps
        delta, search = pgd(
            rest.flow, flow.value, flow.labels, context.num_classes, has_aux=True,
            direction=lambda losses, end: split.direction(after(end), context), step_size=rate, num_steps=num_steps,
            bound=eps if project else jnp.inf, step=step, axis_name=context.axis_name,
            transform=first_span(k, flow.labels.shape[0] * context.devices()),
        )  # fmt: skip
        state = after(search.aux)
        signs = split.direction(state, context)
        place = (flow.labels, context.num_classes)
        ratio = norm_expansion(jax.lax.stop_gradient(flow.value), delta, *place, axis_name=context.axis_name)
        here = class_count(*place, axis_name=context.axis_name) > 0

        def mean_over(chosen: jax.Array) -> jax.Array:
            members = (chosen & here).astype(ratio.dtype)
            return 1 + jnp.sum(members * (ratio - 1)) / jnp.maximum(members.sum(), 1)

        before, (moved, end) = search.aux.trace["logits"], search.last
        if end.labels.shape == moved.shape[:1]:
            amplified = amplification(before, end.trace["logits"], moved, axis_name=context.axis_name)
        else:  # a later link makes more samples of these
            amplified = jnp.zeros([], ratio.dtype)
        metrics = {
            "raised": jnp.sum(signs > 0), "lowered": jnp.sum(signs < 0),
            "expansion_raised": mean_over(signs > 0), "expansion_lowered": mean_over(signs < 0), "amplification": amplified,
            "inner_evaluations": jnp.int32(num_steps),
        }  # fmt: skip
        return delta, (search.losses, clean_logits(search.aux, before)), state, metrics

    def apply(flow: Flow, rest: Rest, state: Any, context: Context):
        delta, (_, clean), state, metrics = search(flow, rest, state, context, False)
        return searched_from(flow, clean)._replace(value=flow.value + delta), state, metrics

    needed = needs(bound, split)
    if len(sites) > 1:
        return site_links(sites, every, split.init, search, check, needed)
    return Perturbation(sites[0], init, apply, search=True, needs=needed)
