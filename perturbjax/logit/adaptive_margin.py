r"""Adaptive margins (AdaptiveFace, AFL): CosFace with a margin for each class, learned with the network.

    min_{w, m}  mean_i ℓ(u_i − s·m_{y_i} e_{y_i}, y_i) − (λ/C) Σ_c m_c,    0 ≤ m_c ≤ 1

The margins take gradient steps of their own, by the gradient of the same loss:
∂/∂m_c = s · (1/B) Σ_{i: y_i = c} (1 − p_{i,y_i}) − λ/C for cross entropy; balanced classes settle where 1 − p_y is λ/s on average.
Source: Liu et al., "AdaptiveFace: Adaptive Margin and Sampling for Face Recognition", CVPR 2019; λ is not certain there.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, class_sum, own_entries
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.logit.cosine import at_true_class, head_needs, head_scale, of_labels
from perturbjax.method import method


def adaptive_margin_step(
    margins: jax.Array,
    slopes: jax.Array,
    labels: jax.Array,
    *,
    scale: ArrayLike,
    weight: ArrayLike = 0.1,
    step_size: ArrayLike = 0.01,
    axis_name: AxisName = None,
) -> jax.Array:
    """The margins [C] after one gradient step, clipped to [0, 1].

    Args:
      margins: m [C]. slopes: ∂ℓ_i/∂u_{i,y_i} [B], the (weighted) losses' derivatives by the true class's logit. labels: [B].
      scale: s. weight: λ. step_size: of the gradient steps. axis_name: mapped axis that the batch is spread over.
    """
    num_classes, count = margins.shape[0], jnp.asarray(labels.shape[0], margins.dtype)
    total = class_sum(slopes, labels, num_classes, axis_name=axis_name).astype(margins.dtype)
    count = count if axis_name is None else jax.lax.psum(count, axis_name)
    number = lambda x: jnp.asarray(x, margins.dtype)
    gradient = -number(scale) * total / count - number(weight) / num_classes
    return jnp.clip(margins - number(step_size) * gradient, 0, 1)


@method(
    target="logit", direction=(+1,), inference="regularised", granularity="category",
    cite="Liu et al., CVPR 2019", off=dict(margin=0.0, step_size=0.0), alias="afl",
)  # fmt: skip
def adaptive_margin(
    *, margin: ArrayLike = 0.35, weight: ArrayLike = 0.1, step_size: ArrayLike = 0.01, scale: ArrayLike | None = None
) -> Perturbation:
    """Adaptive margins (AFL): CosFace with one learned margin per class, kept up by a reward for large margins.

    Args:
      margin: m_c at the start, in 0…1.
      weight: λ, the reward; its term moves the margins only and is left out of the losses. Margins shrink while a class's mean
        1 − p_y is above λ/s (above λ/(s·C·π_c) for a class of frequency π_c): small λ ends near plain training.
      step_size: of the margins' gradient steps.
      scale: s. None: that of the model, which must have a cosine head. A number takes the logits as they are.

    State: the margins [C]. Metrics: margin_mean, margin_max.
    """
    check_number("adaptive_margin", low=0, high=1, margin=margin)
    check_number("adaptive_margin", low=0, weight=weight, step_size=step_size)
    check_number("adaptive_margin", low=0, open_low=True, scale=scale)

    def init(context: Context) -> jax.Array:
        return jnp.full([context.num_classes], margin, context.dtype)

    def apply(flow: Flow, rest: Rest, state: jax.Array, context: Context):
        s = head_scale(scale, context)
        amounts = jnp.asarray(s, flow.value.dtype) * of_labels(state, flow.labels).astype(flow.value.dtype)
        value = flow.value + at_true_class(-amounts, flow.labels, context.num_classes)

        def total(u):
            losses, end = rest.flow(u)
            return jnp.sum(end.weights.astype(u.dtype) * losses + end.penalty.astype(u.dtype))

        by_logits = jax.grad(total)(jax.lax.stop_gradient(value))
        slopes = own_entries(by_logits, flow.labels)
        after = adaptive_margin_step(
            state, jax.lax.stop_gradient(slopes), flow.labels, scale=s, weight=weight, step_size=step_size,
            axis_name=context.axis_name,
        )  # fmt: skip
        return flow._replace(value=value), after, {"margin_mean": state.mean(), "margin_max": state.max()}

    return Perturbation("logits", init, apply, needs=head_needs(scale), reads_labels=True)
