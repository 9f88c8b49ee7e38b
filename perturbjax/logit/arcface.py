r"""ArcFace: an additive margin on the true class's angle.

    s·cos(θ_y + m) for the true class, s·cos θ_c for the others;    where θ_y + m > π: s·(cos θ_y − m sin m), which keeps it falling

s is a constant (the scale of a cosine head), or s_i = ‖w_y‖‖a_i‖ of a linear head, as the taxonomy prints it.
Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019; taxonomy eq. 48, which lacks the log.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, check_samples
from perturbjax.classes import own_entries, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.logit.cosine import at_true_class, head_needs, head_scale
from perturbjax.method import method


def arcface_shift(true_logits: jax.Array, *, margin: ArrayLike = 0.5, scale: ArrayLike) -> jax.Array:
    """s·cos(θ + m) − s·cos θ: [B], ≤ 0, from s·cos θ [B] and s, a number or [B]. The gradient flows through θ.

    >>> print(arcface_shift(jnp.array([0.0, 5.0]), margin=jnp.pi / 6, scale=10.0).round(3))
    [-5. -5.]
    """
    s, m = jnp.asarray(scale, true_logits.dtype), jnp.asarray(margin, true_logits.dtype)
    cos = true_logits / jnp.where(s > 0, s, 1)
    # The floor keeps the derivative of sin θ = √(1 − cos² θ) finite at θ = 0 and π.
    sin = jnp.sqrt(jnp.maximum(1 - cos**2, jnp.finfo(cos.dtype).eps))
    # In this form a margin of 0 is exactly nothing.
    turned = true_logits * (jnp.cos(m) - 1) - s * sin * jnp.sin(m)
    return jnp.where(cos > -jnp.cos(m), turned, -s * m * jnp.sin(m))


def arcface_delta(logits: jax.Array, labels: jax.Array, *, margin: ArrayLike = 0.5, scale: ArrayLike) -> jax.Array:
    """The shift of the logits: [B, C], of s·cos θ [B, C] and labels [B] in 0..C-1 (others, padding, get zeros in jit)."""
    check_samples("arcface_delta", logits, labels)
    return _delta(logits, labels, margin, scale)


def _delta(logits: jax.Array, labels: jax.Array, margin: ArrayLike, scale: ArrayLike) -> jax.Array:
    u = wide(logits)
    own = own_entries(u, labels)
    return at_true_class(arcface_shift(own, margin=margin, scale=scale), labels, u.shape[-1])


@method(
    target="logit", direction=(+1,), inference="hyper-parameter", granularity="corpus",
    cite="Deng et al., CVPR 2019", off=dict(margin=0.0),
)  # fmt: skip
def arcface(*, margin: ArrayLike = 0.5, scale: ArrayLike | Literal["norm"] | None = None) -> Perturbation:
    """ArcFace: the true class must win by an angle m = `margin` (radians); the gradient flows through the angle.

    Args:
      margin: m in 0…π.
      scale: s. None: that of the model, which must have a cosine head. A number takes the logits as s·cos θ. "norm" (taxonomy eq. 48)
        takes s_i = ‖w_y‖‖a_i‖ from the features and a linear head, whose bias stays out of the angle.
    """
    check_number("arcface", low=0, high=math.pi, margin=margin)
    if isinstance(scale, str):
        check_choice("arcface", "scale", scale, ("norm",))
    else:
        check_number("arcface", low=0, open_low=True, scale=scale)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        if isinstance(scale, str):
            assert context.head is not None  # it is among the needs
            rows, features = context.head()[0].astype(flow.value.dtype), flow.trace["features"].astype(flow.value.dtype)
            own = jnp.take(rows, flow.labels, axis=0, mode="clip")
            along = jnp.sum(own * features, axis=-1)
            size = jnp.sqrt(jnp.maximum(jnp.sum(own**2, axis=-1) * jnp.sum(features**2, axis=-1), 1e-24))
            shift = at_true_class(arcface_shift(along, margin=margin, scale=size), flow.labels, context.num_classes)
        else:
            s = head_scale(scale, context)
            shift = _delta(flow.value, flow.labels, margin, s)
        return flow._replace(value=flow.value + shift), state, {}

    needs = ("features", "head") if isinstance(scale, str) else head_needs(scale)
    return Perturbation("logits", lambda context: (), apply, needs=needs, reads_labels=True)
