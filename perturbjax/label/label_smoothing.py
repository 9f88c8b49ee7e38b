r"""Label smoothing: moves the targets, or the predictions, towards the uniform distribution.

    on="target"       y + λ (1/C − y)
    on="prediction"   p + λ (1/C − p)

On the prediction (taxonomy eq. 6-ii) the sign of the effect turns round: the net must be surer for the same loss. That is the forward
correction for symmetric noise of rate λ. Source: Szegedy et al., CVPR 2016; taxonomy eqs. 6 and 13. The function is `optax.smooth_labels`.
"""

from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Szegedy et al., CVPR 2016", off=dict(weight=0.0), alias="ls",
)  # fmt: skip
def label_smoothing(*, weight: ArrayLike = 0.1, on: Literal["target", "prediction"] = "target") -> Perturbation:
    """Label smoothing: mixes targets (or, `on` "prediction", predictions) with the uniform distribution, λ = `weight` in [0, 1]."""
    check_number("label_smoothing", low=0, high=1, weight=weight)
    check_choice("label_smoothing", "on", on, ("target", "prediction"))

    def of_targets(flow: Flow, rest: Rest, state: tuple, context: Context):
        return flow._replace(value=optax.smooth_labels(flow.value, jnp.asarray(weight, flow.value.dtype))), state, {}

    def of_predictions(flow: Flow, rest: Rest, state: tuple, context: Context):
        amount, uniform = jnp.asarray(weight, flow.value.dtype), -jnp.log(jnp.asarray(context.num_classes, flow.value.dtype))
        # log((1 − λ)p + λ/C) from log p, without leaving the logarithms.
        smoothed = jnp.logaddexp(flow.value + jnp.log1p(-amount), uniform + jnp.log(amount))
        return flow._replace(value=jnp.where(amount > 0, smoothed, flow.value)), state, {}

    if on == "target":
        return Perturbation("label", lambda context: (), of_targets)
    return Perturbation("prediction", lambda context: (), of_predictions)
