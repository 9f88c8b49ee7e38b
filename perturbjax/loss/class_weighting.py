r"""Class weighting: one factor of the loss per class.

    balanced    w_c = N/(C · N_c)
    effective   w_c ∝ (1 − β)/(1 − β^{N_c}), scaled to sum C          Cui et al., CVPR 2019

The factor belongs to the sample's label and multiplies its whole loss, so smoothed or mixed targets keep their proportions
(weighting each class's term instead would distort them). The loss is the mean over the batch of the weighted losses, or, with
average="weights", their sum over the sum of the weights: Σ_i w_{y_i} ℓ_i / Σ_i w_{y_i}. With `start` the weights act late in training
only: deferred re-weighting (DRW), which goes with LDAM. Source: King & Zeng 2001 (balanced); Cui et al., CVPR 2019; Cao et al.,
NeurIPS 2019 (deferred).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_class_counts, check_number, is_traced
from perturbjax.link import Context, Flow, Perturbation, Rest, counted_samples
from perturbjax.method import method

KINDS = ("none", "balanced", "effective")


def class_weights(
    class_counts: ArrayLike, *, kind: Literal["none", "balanced", "effective"] = "balanced", beta: ArrayLike = 0.9999
) -> jax.Array:
    """w: [C], from the number of training samples of each class [C].

    Raises:
      ValueError: a class without samples.

    >>> print(class_weights(jnp.array([30, 10])).round(3))
    [0.667 2.   ]
    """
    check_choice("class_weights", "kind", kind, KINDS)
    n = jnp.asarray(class_counts, float)
    if kind == "none":
        return jnp.ones_like(n)
    check_class_counts("class_weights", class_counts)
    if kind == "balanced":
        return n.sum() / (n.shape[0] * n)
    # expm1 keeps 1 − β^n for β near 1; what float32 makes of 1 − β itself drops out of the proportions.
    beta = jnp.asarray(beta, n.dtype)
    raw = (1 - beta) / -jnp.expm1(n * jnp.log(beta))
    return raw * (n.shape[0] / raw.sum())


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="category",
    cite="Cui et al., CVPR 2019", off=dict(kind="none"), alias="weighting",
)  # fmt: skip
def class_weighting(
    *,
    kind: Literal["none", "balanced", "effective"] = "balanced",
    beta: ArrayLike = 0.9999,
    weights: tuple[float, ...] | None = None,
    start: ArrayLike = 0.0,
    average: Literal["batch", "weights"] = "batch",
) -> Perturbation:
    """Multiplies each sample's weight by that of its class.

    Args:
      kind: "none", "balanced" or "effective" (number of samples, with `beta`). weights: C numbers instead of a kind.
      start: share of training after which the weights act (0.8 for deferred re-weighting); before, all are 1.
      average: "batch" divides the sum of the weighted losses by the number of samples, "weights" by the sum of the classes' weights
        over the batch of all devices (torch's `CrossEntropyLoss(weight=)`), so that a batch of rare classes counts no more than others;
        without those of the batch's samples of weight 0, which are padding.
    """
    check_choice("class_weighting", "kind", kind, KINDS)
    if not is_traced(beta) and not 0 < float(np.asarray(beta)) <= 1 - 1e-7:
        raise ValueError(f"class_weighting needs 0 < beta < 1, got {beta}. The limit 1 is kind='balanced', up to a factor.")
    check_number("class_weighting", low=0, weights=weights)
    check_number("class_weighting", low=0, high=1, start=start)
    check_choice("class_weighting", "average", average, ("batch", "weights"))

    def factors(context: Context) -> jax.Array:
        if weights is None:
            return class_weights(context.class_counts, kind=kind, beta=beta)
        if len(weights) != context.num_classes:
            raise ValueError(f"class_weighting needs {context.num_classes} weights, got {len(weights)}. Give one per class.")
        return jnp.asarray(weights, float)

    def init(context: Context) -> tuple:
        factors(context)  # a class without samples or a missing weight is found out here
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        factor = factors(context)[flow.labels].astype(flow.weights.dtype)
        if average == "weights":
            real = counted_samples(flow).astype(factor.dtype)
            total, count = jnp.sum(real * factor), real.sum()
            if context.axis_name is not None:
                total, count = jax.lax.psum((total, count), context.axis_name)
            factor = factor * jnp.where(total > 0, count / jnp.where(total > 0, total, 1), 1)
        factor = jnp.where(context.begun(start), factor, 1)
        return flow._replace(weights=flow.weights * factor), state, {}

    return Perturbation("loss", init, apply, needs=("class_counts",) if weights is None else ())
