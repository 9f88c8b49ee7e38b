r"""Implicit semantic data augmentation (ISDA): the loss of infinitely many Gaussian copies of the features, in closed form.

    u_j + (λ_t/2)(w_j − w_y)ᵀ Σ_y (w_j − w_y),    λ_t = λ₀ · t/T

Σ_c is the running covariance of class c's features, a constant for the gradient; the class rows w are not.
Source: Wang et al., "Implicit Semantic Data Augmentation for Deep Networks", NeurIPS 2019; LPL eqs. 5–7, taxonomy eqs. 33–35
(whose eq. 33 lacks the log); github.com/blackfeather-wang/ISDA-for-Deep-Networks at b66a594.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import RunningCovariance, running_covariance_init, running_covariance_update, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


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


class ISDAState(NamedTuple):
    """The running covariance by class, and when the epoch began."""

    count: jax.Array  # [C], samples that the covariance stands for
    mean: jax.Array  # [C, d]
    covariance: jax.Array  # [C, d, d]
    epoch: jax.Array  # [] int32, the epoch that `began` belongs to
    began: jax.Array  # [], progress at the beginning of the epoch: epoch/epochs


@method(
    target="logit", direction=(+1,), inference="prior", granularity="category",
    cite="Wang et al., NeurIPS 2019", off=dict(strength=0.0),
)  # fmt: skip
def isda(
    *,
    strength: ArrayLike = 0.5,
    ramp: Literal["step", "epoch", "none"] = "step",
    update: Literal["before", "after"] = "before",
    decay: ArrayLike = 1.0,
) -> Perturbation:
    """ISDA with λ₀ = `strength` (0.25 and 0.5 are recommended): raises every loss by the spread of the class's features.

    Needs the site "features" and the head's weights. The gradient reaches the head through w as well.

    Args:
      ramp: λ_t = λ₀·step/steps, or λ₀·epoch/epochs as in the authors' code (0 in the first epoch), or λ₀ throughout.
      update: the covariance takes in the batch before it is used on it (the authors' code), or after.
      decay: 1: exact over all of training (the authors' code). Below 1 the counts so far are multiplied by it at each step, so that
        old features are forgotten over about 1/(1 − decay) batches of a class.
    """
    check_number("isda", low=0, strength=strength)
    check_number("isda", low=0, high=1, decay=decay)
    check_choice("isda", "ramp", ramp, ("step", "epoch", "none"))
    check_choice("isda", "update", update, ("before", "after"))

    def init(context: Context) -> ISDAState:
        covariance = running_covariance_init(context.num_classes, context.features_size(), dtype=context.dtype)
        return ISDAState(*covariance, jnp.int32(-1), jnp.zeros([], context.dtype))

    def advance(state: ISDAState, flow: Flow, context: Context) -> ISDAState:
        before = RunningCovariance(state.count * jnp.asarray(decay, state.count.dtype), state.mean, state.covariance)
        now = running_covariance_update(before, flow.trace["features"], flow.labels, axis_name=context.axis_name)
        if ramp != "epoch":
            return ISDAState(*now, state.epoch, state.began)
        epoch = jnp.asarray(context.epoch, jnp.int32)
        began = jnp.where(epoch != state.epoch, jnp.asarray(context.progress, state.began.dtype), state.began)
        return ISDAState(*now, epoch, began)

    def apply(flow: Flow, rest: Rest, state: ISDAState, context: Context):
        after = advance(state, flow, context)
        ramped = jnp.asarray(
            {"step": lambda: context.progress, "epoch": lambda: after.began, "none": lambda: 1}[ramp](), context.dtype
        )
        covariance = after.covariance if update == "before" else state.covariance
        weights, _ = context.head()
        shift = isda_delta(weights, covariance, strength=jnp.asarray(strength, context.dtype) * ramped)
        return flow._replace(value=flow.value + shift[flow.labels].astype(flow.value.dtype)), after, {}

    return Perturbation("logits", init, apply, needs=("features", "head"), reads_labels=True)
