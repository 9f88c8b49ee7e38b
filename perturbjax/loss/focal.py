r"""Focal loss, softmax form: down-weights samples that are classified well.

    (1 − p_y)^γ · ℓ

p_y is the probability of the (dominant) true class; the factor takes part in the gradient. Source: Lin et al., ICCV 2017.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method


def focal_factor(log_probabilities: jax.Array, labels: jax.Array, *, gamma: ArrayLike = 2.0) -> jax.Array:
    """(1 − p_y)^γ: [B], from log p [B, C] and labels [B].

    >>> print(focal_factor(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0]), gamma=2.0))
    [0.0625]
    """
    log_p = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1, mode="clip")[:, 0]  # padding: some number, no nan
    # −expm1(log p) keeps 1 − p exact near 1; the floor keeps the power's derivative finite at p = 1.
    miss = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).tiny)
    return miss ** jnp.asarray(gamma, log_p.dtype)


@method(
    target="loss", direction=(-1,), inference="prior", granularity="sample",
    cite="Lin et al., ICCV 2017", off=dict(gamma=0.0),
)  # fmt: skip
def focal(*, gamma: ArrayLike = 2.0) -> Perturbation:
    """Focal loss with exponent γ = `gamma`; multiplies whatever the loss is so far (cross entropy, or after other loss links)."""
    check_number("focal", low=0, gamma=gamma)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        factor = focal_factor(jax.nn.log_softmax(flow.trace["logits"]), flow.labels, gamma=gamma)
        return flow._replace(value=flow.value * factor), state, {}

    return Perturbation("loss", lambda context: (), apply)
