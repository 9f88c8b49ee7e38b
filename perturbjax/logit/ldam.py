r"""LDAM: label-distribution-aware margins, larger for rare classes; with deferred re-weighting, LDAM-DRW.

    u_y − s·Δ_y,    Δ_c = Δ · (min_j n_j/n_c)^{1/4} = C/n_c^{1/4}        on u = s·cos θ
    DRW: from 80 % of training on, weights (1 − β)/(1 − β^{n_c}), scaled to sum C

C is the constant that makes the rarest class's margin Δ = 0.5, not the number of classes (LPL eqs. 8–9 read otherwise).
Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019;
github.com/kaidic/LDAM-DRW at 2536330, whose classifier is a cosine head with s = 30 under this loss.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_class_counts, check_number, is_traced
from perturbjax.link import Context, Flow, Perturbation, Rest, reached
from perturbjax.logit.cosine import at_true_class, head_needs, head_scale, of_labels
from perturbjax.loss.class_weighting import class_weights
from perturbjax.method import method


def ldam_margins(class_counts: ArrayLike, *, margin: ArrayLike = 0.5) -> jax.Array:
    """Δ_c = margin·(min_j n_j/n_c)^{1/4}: [C], from the number of training samples of each class [C].

    Raises:
      ValueError: a class without samples.

    >>> print(ldam_margins(jnp.array([1600, 100])))
    [0.25 0.5 ]
    """
    check_class_counts("ldam", class_counts)
    n = jnp.asarray(class_counts, float)
    return jnp.asarray(margin, n.dtype) * (n.min() / n) ** 0.25


def deferred_weights(
    class_counts: ArrayLike, *, progress: ArrayLike, start: ArrayLike = 0.8, beta: ArrayLike = 0.9999
) -> jax.Array:
    """DRW's weights: [C], ones before `start` of training, then (1 − β)/(1 − β^{n_c}) scaled to sum C.

    >>> print(np.asarray(deferred_weights(jnp.array([100, 50]), progress=0.9)).round(2))
    [0.67 1.33]
    """
    return jnp.where(reached(progress, start), class_weights(class_counts, kind="effective", beta=beta), 1)


@method(
    target="logit", direction=(+1,), inference="prior", granularity="category",
    cite="Cao et al., NeurIPS 2019", off=dict(margin=0.0),
)  # fmt: skip
def ldam(
    *,
    margin: ArrayLike = 0.5,
    scale: ArrayLike | None = None,
    drw: bool = False,
    start: ArrayLike = 0.8,
    beta: ArrayLike = 0.9999,
    average: Literal["weights", "batch"] = "weights",
) -> Perturbation:
    """LDAM: lowers the true class's logit by a margin that is larger for rare classes; with drw=True, LDAM-DRW.

    Args:
      margin: Δ, the cosine margin of the rarest class.
      scale: s. None: that of the model, which must have a cosine head, as the authors' has. A number takes the logits as they are:
        1 with a linear head is MetaSAug's variant.
      drw: multiplies the losses by class-balanced weights from `start` (share of training) on, with `beta`.
      average: the weighted losses are divided by the sum of the batch's class weights (the code, torch's weighted mean), or by B
        ("batch"), which under a long tail makes the loss several times smaller from `start` on. Weights of samples don't enter it.
    """
    check_number("ldam", low=0, margin=margin)
    check_number("ldam", low=0, open_low=True, scale=scale)
    check_number("ldam", low=0, high=1, start=start)
    check_choice("ldam", "average", average, ("weights", "batch"))
    if not is_traced(beta) and not 0 < float(np.asarray(beta)) <= 1 - 1e-7:
        raise ValueError(f"ldam needs 0 < beta < 1, got {beta}. The authors have beta=0.9999.")

    def init(context: Context) -> tuple:
        ldam_margins(context.class_counts)  # a class without samples is found out here
        return ()

    def reweighted(weights: jax.Array, labels: jax.Array, context: Context) -> jax.Array:
        by_class = deferred_weights(context.class_counts, progress=context.progress, start=start, beta=beta)
        own = of_labels(by_class, labels).astype(weights.dtype)
        after = weights * own
        if average == "batch":
            return after
        # By the batch's class weights alone: with the sample weights in the sum, the class weights would cancel where a link asks for
        # the gradient of one class's samples (PCGrad), and the classes' parts of the loss would not add up to it.
        total = lambda x: x.sum() if context.axis_name is None else jax.lax.psum(x.sum(), context.axis_name)
        sums, members = total(own), total((own > 0).astype(own.dtype))
        return after * (members / jnp.where(sums > 0, sums, 1))

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        margins = ldam_margins(context.class_counts, margin=margin).astype(flow.value.dtype)
        s = jnp.asarray(head_scale(scale, context), margins.dtype)
        shift = at_true_class(-s * of_labels(margins, flow.labels), flow.labels, context.num_classes)
        flow = flow._replace(value=flow.value + shift)
        return flow._replace(weights=reweighted(flow.weights, flow.labels, context)) if drw else flow, state, {}

    return Perturbation("logits", init, apply, needs=("class_counts", *head_needs(scale)), reads_labels=True)
