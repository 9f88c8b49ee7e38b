r"""Focal loss: down-weights samples that are classified well.

    sample      (1 − p_y)^γ · ℓ
    category    (1 − p̄_y)^γ · ℓ,   p̄_c = mean_{j: y_j = c} p_{j,c} over the batch        (taxonomy, footnote 4)
    sigmoid     Σ_c (1 − q_c)^γ · (−log q_c),   q_c = σ(u_c) for the true class, 1 − σ(u_c) for the others

The sigmoid form is that of the detectors, and of the class-balanced loss (Cui et al., CVPR 2019), whose weights are those of
`class_weighting(kind="effective")`; it replaces the cross entropy. p_y is the probability of the (dominant) true class. The sample's
factor takes part in the gradient; the class's is a weight, constant for it (our reading). Source: Lin et al., "Focal Loss for Dense
Object Detection", ICCV 2017.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import class_mean, own_entries, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def focal_factor(log_probabilities: jax.Array, labels: jax.Array, *, gamma: ArrayLike = 2.0) -> jax.Array:
    """(1 − p_y)^γ: [B], from log p [B, C] and labels [B].

    >>> print(focal_factor(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0]), gamma=2.0))
    [0.0625]
    """
    miss = _miss(log_probabilities, labels)
    return miss ** jnp.asarray(gamma, miss.dtype)


def sigmoid_focal_losses(logits: jax.Array, targets: jax.Array, *, gamma: ArrayLike = 2.0) -> jax.Array:
    """Σ_c exp(−γ(y_c u_c + log(1 + e^{−u_c}))) · (log(1 + e^{u_c}) − y_c u_c): [B], of logits and targets [B, C].

    >>> print(sigmoid_focal_losses(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]), gamma=1.0).round(3))  # 2 · ½ · log 2
    [0.693]
    """
    u, y = wide(logits), targets.astype(wide(logits).dtype)
    factor = jnp.exp(-jnp.asarray(gamma, u.dtype) * (y * u + jax.nn.softplus(-u)))
    return jnp.sum(factor * (jax.nn.softplus(u) - y * u), axis=-1)


def _miss(log_probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """1 − p_y: [B]."""
    log_p = own_entries(log_probabilities, labels)
    # −expm1(log p) keeps 1 − p exact near 1; the floor keeps the power's derivative finite at p = 1.
    return jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).tiny)


@method(
    target="loss", direction=(-1,), inference="prior", granularity=("sample", "category"),
    cite="Lin et al., ICCV 2017", off=dict(gamma=0.0),
)  # fmt: skip
def focal(
    *,
    gamma: ArrayLike = 2.0,
    granularity: Literal["sample", "category"] = "sample",
    form: Literal["softmax", "sigmoid"] = "softmax",
) -> Perturbation:
    """Focal loss with exponent γ = `gamma`; multiplies whatever the loss is so far (cross entropy, or after other loss links).

    Args:
      gamma: γ.
      granularity: "sample" looks at each sample's probability, "category" at its class's mean over the batch.
      form: "softmax"; "sigmoid": every class is a question of its own. It replaces the loss so far, so it comes before the other links
        of the loss. Heads for it begin with biases −log(C − 1), so that all classes are improbable.
    """
    check_number("focal", low=0, gamma=gamma)
    check_choice("focal", "granularity", granularity, ("sample", "category"))
    check_choice("focal", "form", form, ("softmax", "sigmoid"))
    if form == "sigmoid" and granularity == "category":
        raise ValueError("focal needs granularity='sample' for form='sigmoid', got 'category'. Leave granularity out.")

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        if form == "sigmoid":
            losses = sigmoid_focal_losses(flow.trace["logits"], flow.targets, gamma=gamma)
            return flow._replace(value=losses.astype(flow.value.dtype)), state, {}
        log_p = jax.nn.log_softmax(flow.trace["logits"])
        if granularity == "sample":
            factor = focal_factor(log_p, flow.labels, gamma=gamma)
        else:
            miss = jax.lax.stop_gradient(_miss(log_p, flow.labels))
            mean = class_mean(miss, flow.labels, context.num_classes, axis_name=context.axis_name)
            factor = (mean ** jnp.asarray(gamma, mean.dtype)).at[flow.labels].get(mode="clip")
        return flow._replace(value=flow.value * factor), state, {}

    return Perturbation("loss", lambda context: (), apply)
