r"""Label smoothing: moves the targets towards the uniform distribution.

    Δy = λ (1/C − y)

Source: Szegedy et al., CVPR 2016; taxonomy eq. 13. The function is `optax.smooth_labels`.
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Szegedy et al., CVPR 2016", off=dict(weight=0.0), alias="ls",
)  # fmt: skip
def label_smoothing(*, weight: ArrayLike = 0.1) -> Perturbation:
    """Label smoothing with λ = `weight` in [0, 1]."""
    check_number("label_smoothing", low=0, high=1, weight=weight)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        return flow._replace(value=optax.smooth_labels(flow.value, jnp.asarray(weight, flow.value.dtype))), state, {}

    return Perturbation("label", lambda context: (), apply)
