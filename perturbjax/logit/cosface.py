r"""CosFace: an additive margin on the true class's cosine.

    s·(cos θ_y − m) for the true class, s·cos θ_c for the others

Source: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_classes, check_labels, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.logit.cosine import DEFAULT_SCALE, at_true_class, head_needs, head_scale
from perturbjax.method import method


def cosface_delta(
    labels: jax.Array, num_classes: int, *, margin: ArrayLike = 0.35, scale: ArrayLike = DEFAULT_SCALE
) -> jax.Array:
    """−s·m at the true class, 0 elsewhere: [B, C], from labels [B] in 0..C-1 (others, padding, get zeros in jit).

    >>> print(cosface_delta(jnp.array([1, 0]), 2, margin=0.5, scale=10.0))
    [[ 0. -5.]
     [-5.  0.]]
    """
    check_classes("cosface_delta", num_classes)
    check_labels("cosface_delta", labels, num_classes)
    return at_true_class(_amount(margin, scale), labels, num_classes)


def _amount(margin: ArrayLike, scale: ArrayLike) -> jax.Array:
    return -jnp.asarray(scale, float) * jnp.asarray(margin, float)


@method(
    target="logit", direction=(+1,), inference="hyper-parameter", granularity="corpus",
    cite="Wang et al., CVPR 2018", off=dict(margin=0.0),
)  # fmt: skip
def cosface(*, margin: ArrayLike = 0.35, scale: ArrayLike | None = None) -> Perturbation:
    """CosFace: the true class must win by a cosine margin m = `margin`.

    Args:
      margin: m ≥ 0.
      scale: s. None: that of the model, which must have a cosine head. A number takes the logits as they are.
    """
    check_number("cosface", low=0, margin=margin)
    check_number("cosface", low=0, open_low=True, scale=scale)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        amount = _amount(margin, head_scale(scale, context))
        shift = at_true_class(amount, flow.labels, context.num_classes)
        return flow._replace(value=flow.value + shift.astype(flow.value.dtype)), state, {}

    return Perturbation("logits", lambda context: (), apply, needs=head_needs(scale), reads_labels=True)
