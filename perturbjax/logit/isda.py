r"""Implicit semantic data augmentation (ISDA): the loss of infinitely many Gaussian copies of the features, in closed form.

    u_j + (λ_t/2)(w_j − w_y)ᵀ Σ_y (w_j − w_y),    λ_t = λ₀ · t/T

Σ_c is the running covariance of class c's features, a constant for the gradient; the class rows w are not.
Source: Wang et al., "Implicit Semantic Data Augmentation for Deep Networks", NeurIPS 2019; LPL eqs. 5–7, taxonomy eqs. 33–35
(whose eq. 33 lacks the log).
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import RunningCovariance, running_covariance_init, running_covariance_update, wide
from perturbjax.core import Context, Flow, Perturbation, Rest, method


def isda_delta(weights: jax.Array, covariance: jax.Array, *, strength: ArrayLike = 0.5) -> jax.Array:
    """The shift of the logits for each class: [C, C], row y for the samples of class y; zero on the diagonal, ≥ 0 elsewhere.

    Args:
      weights: [C, d], rows of the last layer.
      covariance: [C, d, d], of each class's features, symmetric. A constant here: stop its gradient where it has one.
      strength: λ.

    >>> print(isda_delta(jnp.eye(2), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), strength=1.0))
    [[0. 1.]
     [2. 0.]]
    """
    w = wide(weights)
    # The three terms nearly cancel where two rows are close: no shortened floats in the products.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    mapped = einsum("cd,yde->yce", w, covariance.astype(w.dtype))  # w_c Σ_y
    own = einsum("yce,ce->yc", mapped, w)  # w_cᵀ Σ_y w_c
    cross = einsum("yce,ye->yc", mapped, w)  # w_cᵀ Σ_y w_y
    return jnp.asarray(strength, w.dtype) / 2 * (own - 2 * cross + jnp.diagonal(own)[:, None])


@method(
    target="logit", direction=(+1,), inference="prior", granularity="category",
    cite="Wang et al., NeurIPS 2019", off=dict(strength=0.0),
)  # fmt: skip
def isda(*, strength: ArrayLike = 0.5) -> Perturbation:
    """ISDA with λ₀ = `strength`, raised linearly over training (0.25 and 0.5 are recommended).

    Needs the site "features" and the head's weights. The covariance is exact over all of training and takes in the batch
    before it is used, as the official code does. The gradient reaches the head through w as well.
    """
    check_number("isda", low=0, strength=strength)

    def init(context: Context) -> RunningCovariance:
        shape = context.site_shapes["features"]
        if len(shape) != 2:
            raise ValueError(f"isda needs features [B, d], got {shape}. Put the site 'features' after the pooling.")
        return running_covariance_init(context.num_classes, shape[1])

    def apply(flow: Flow, rest: Rest, state: RunningCovariance, context: Context):
        state = running_covariance_update(state, flow.trace["features"], flow.labels, axis_name=context.axis_name)
        weights, _ = context.head()
        shift = isda_delta(weights, state.covariance, strength=jnp.asarray(strength, jnp.float32) * context.progress)
        return flow._replace(value=flow.value + shift[flow.labels].astype(flow.value.dtype)), state, {}

    return Perturbation("logits", init, apply, needs=("features", "head"))
