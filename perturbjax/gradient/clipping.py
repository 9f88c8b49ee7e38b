r"""Gradient clipping: shrinks the whole gradient to a largest norm.

    g̃ = g · min(1, τ/‖g‖)

Source: Pascanu et al., ICML 2013; LPG eq. 3. The function is `optax.clip_by_global_norm`.
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method


@method(
    target="gradient", direction=(-1,), inference="prior", granularity="corpus",
    cite="Pascanu et al., ICML 2013", gradient="transforms", off=dict(bound=jnp.inf), alias="clip",
)  # fmt: skip
def gradient_clipping(*, bound: ArrayLike = 1.0) -> optax.GradientTransformationExtraArgs:
    """An optax link: the gradient's global l2 norm is at most `bound` (τ); inf leaves it alone."""
    check_number("gradient_clipping", low=0, open_low=True, infinite=True, bound=bound)
    return optax.with_extra_args_support(optax.clip_by_global_norm(bound))
