r"""Margin-based label smoothing (MbLS): penalises logits that lie more than a margin below the largest one.

    ℓ + λ · (1/C) Σ_c max(0, max_j u_j − u_c − m)

Label smoothing is this with m = 0, up to its form; the gradient flows through the maximum too, as in the official code.
Source: Liu et al., "The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration", CVPR 2022.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def margin_excess(logits: jax.Array, *, margin: ArrayLike = 10.0) -> jax.Array:
    """(1/C) Σ_c max(0, max_j u_j − u_c − m): [B], from logits [B, C].

    >>> print(margin_excess(jnp.array([[12.0, 4.0, 0.0, 0.0]])))
    [1.]
    """
    below = logits.max(axis=-1, keepdims=True) - logits
    return jnp.mean(jnp.maximum(0, below - jnp.asarray(margin, logits.dtype)), axis=-1)


@method(
    target="logit", direction=(), inference="prior", granularity="sample",
    cite="Liu et al., CVPR 2022", off=dict(weight=0.0),
)  # fmt: skip
def mbls(*, weight: ArrayLike = 0.1, margin: ArrayLike = 10.0) -> Perturbation:
    """Margin-based label smoothing: adds λ = `weight` times how far the logits lie more than `margin` below the largest one."""
    check_number("mbls", low=0, weight=weight)
    check_number("mbls", low=0, infinite=True, margin=margin)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        excess = margin_excess(flow.value, margin=margin)
        added = jnp.asarray(weight, excess.dtype) * excess
        return flow._replace(penalty=flow.penalty + added.astype(flow.penalty.dtype)), state, {"excess": excess.mean()}

    return Perturbation("logits", lambda context: (), apply)
