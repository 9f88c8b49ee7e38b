r"""PolyLoss (Poly-1): cross entropy with another first coefficient in its expansion in powers of 1 − p_y.

    −log p_y + ε₁ (1 − p_y),   −log p_y = Σ_j (1 − p_y)^j / j

The function is `optax.losses.poly_loss_cross_entropy`; the link adds its second term only, so that it also acts on a loss that
other links have changed, and ε₁ = 0 changes nothing. Soft targets take Σ_c ŷ_c (1 − p_c), as there.
Source: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


@method(
    target="loss", direction=(+1,), inference="prior", granularity="sample",
    cite="Leng et al., ICLR 2022", off=dict(epsilon=0.0), alias="poly",
)  # fmt: skip
def poly_loss(*, epsilon: ArrayLike = 2.0) -> Perturbation:
    """PolyLoss: adds `epsilon` times the probability of being wrong to the loss (2 for images; negative down to −1 lowers it)."""
    check_number("poly_loss", low=-1, epsilon=epsilon)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        miss = jnp.sum(flow.targets * -jnp.expm1(flow.trace["prediction"]), axis=-1)
        return flow._replace(value=flow.value + jnp.asarray(epsilon, miss.dtype) * miss), state, {}

    return Perturbation("loss", lambda context: (), apply)
