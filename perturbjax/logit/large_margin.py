r"""Large-margin softmax (L-softmax): the angle between the features and the true class's row counts m times.

    u_y ← ‖w_y‖ ‖a‖ (λ cos θ + ψ(θ))/(1 + λ),    ψ(θ) = (−1)^k cos(mθ) − 2k   for θ in [kπ/m, (k + 1)π/m]

θ is the angle between the features a and w_y; ψ ≤ cos θ falls monotonically. λ goes from 1000 to 5 on a geometric course over the first
part of training (the original's decays with the iterations; its course is ours). As a perturbation of u_y: ‖w_y‖‖a‖(ψ − cos θ)/(1 + λ);
so a bias, which the original has not, stays as it is. The gradient flows through it, into a and w.
Source: Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def angle_margin(cosine: jax.Array, *, margin: int = 4) -> jax.Array:
    """ψ(θ) from cos θ, of any shape; cos(mθ) is the m-th Chebyshev polynomial of cos θ, so no angle is computed.

    >>> print(angle_margin(jnp.array([1.0, 0.0, -1.0]), margin=2))
    [ 1. -1. -3.]
    """
    before, multiple = jnp.ones_like(cosine), cosine
    for _ in range(margin - 1):
        before, multiple = multiple, 2 * cosine * multiple - before
    k = sum(jnp.asarray(cosine < math.cos(j * math.pi / margin), cosine.dtype) for j in range(1, margin))
    return (1 - 2 * (k % 2)) * multiple - 2 * k if margin > 1 else cosine


def large_margin_shift(
    features: jax.Array, weights: jax.Array, labels: jax.Array, *, margin: int = 4, anneal: ArrayLike = 0.0
) -> jax.Array:
    """What is added to the logit of the true class: [B], at most 0. `anneal` is λ; zero features or rows give zero.

    Args:
      features: [B, d]. weights: [C, d], rows of the last layer. labels: [B]; those of no class (padding) give zero.
    """
    a, rows = wide(features), wide(weights)
    own = rows.astype(a.dtype).at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    dot = functools.partial(jnp.einsum, "bd,bd->b", precision=jax.lax.Precision.HIGHEST)
    square = dot(a, a) * dot(own, own)
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    cosine = jnp.clip(dot(a, own) / length, -1, 1)
    gap = angle_margin(cosine, margin=margin) - cosine
    return jnp.where(square > 0, length * gap / (1 + jnp.asarray(anneal, a.dtype)), 0)


@method(
    target="logit", direction=(+1,), inference="hyper-parameter", granularity="corpus",
    cite="Liu et al., ICML 2016", off=dict(margin=1),
)  # fmt: skip
def large_margin(*, margin: int = 4, first: ArrayLike = 1000.0, last: ArrayLike = 5.0, ramp: ArrayLike = 0.5) -> Perturbation:
    """Large-margin softmax: multiplies the angle to the true class by `margin` (2 to 4), so that it must be that much smaller.

    Needs the site "features" and the head's weights.

    Args:
      margin: m; 1 is plain softmax. first, last: λ at the beginning and from the share `ramp` of training on.
    """
    check_number("large_margin", low=1, margin=margin)
    check_number("large_margin", low=0, open_low=True, first=first, last=last)
    check_number("large_margin", low=0, high=1, ramp=ramp)

    def anneal(context: Context) -> jax.Array:
        done = jnp.asarray(context.progress, context.dtype) / jnp.maximum(jnp.asarray(ramp, context.dtype), 1e-6)
        begin, end = (jnp.log(jnp.asarray(x, context.dtype)) for x in (first, last))
        return jnp.exp(begin + (end - begin) * jnp.minimum(done, 1))

    def init(context: Context) -> tuple:
        context.features_size()
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        if margin == 1:
            return flow, state, {}
        weight = anneal(context)
        rows, _ = context.head()
        shift = large_margin_shift(flow.trace["features"], rows, flow.labels, margin=margin, anneal=weight)
        true = jax.nn.one_hot(flow.labels, context.num_classes, dtype=flow.value.dtype)
        moved = flow.value + shift.astype(flow.value.dtype)[:, None] * true
        return flow._replace(value=moved), state, {"anneal": weight}

    return Perturbation("logits", init, apply, needs=("features", "head"), reads_labels=True)
