r"""Confidence penalty: predictions of low entropy cost something.

    ℓ + β · max(0, τ − H(p)),   H(p) = −Σ_c p_c log p_c;        without τ: ℓ − β · H(p), the same for τ → ∞ up to a constant

The taxonomy's eq. 20 has the signs turned round. Source: Pereyra et al., "Regularizing Neural Networks by Penalizing Confident
Output Distributions", ICLR 2017 workshop.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def entropy(log_probabilities: jax.Array) -> jax.Array:
    """H(p) in nats: [...] from log p [..., C], in 0..log C; a probability of exactly 0 adds nothing.

    >>> print(entropy(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]]))).round(3))
    [0.693 0.   ]
    """
    finite = log_probabilities > -jnp.inf
    log_p = jnp.where(finite, log_probabilities, 0)
    return jnp.sum(jnp.where(finite, jnp.exp(log_p) * -log_p, 0), axis=-1)


@method(
    target="loss", direction=(), inference="prior", granularity="sample",
    cite="Pereyra et al., ICLR 2017", off=dict(weight=0.0), alias="cp",
)  # fmt: skip
def confidence_penalty(*, weight: ArrayLike = 0.1, tau: ArrayLike | None = None) -> Perturbation:
    """Confidence penalty β = `weight`: rewards entropy of the prediction, up to the threshold `tau` in 0..log C (None: without end)."""
    check_number("confidence_penalty", low=0, weight=weight, tau=tau)

    def init(context: Context) -> tuple:
        check_number(
            "confidence_penalty", low=0, high=float(np.log(context.num_classes)), tau=tau
        )  # beyond, H never gets there
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        h = entropy(flow.trace["prediction"])
        cost = -h if tau is None else jnp.maximum(0, jnp.asarray(tau, h.dtype) - h)
        return flow._replace(value=flow.value + jnp.asarray(weight, h.dtype) * cost), state, {"entropy": h.mean()}

    return Perturbation("loss", init, apply)
