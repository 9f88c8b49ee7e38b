r"""Adversarial label smoothing (ALS): smooths each target towards the class that the net finds least probable.

    Δy = λ (e_{argmin_c p_c} − y),    the exact maximum of ℓ(p, y + λ(p* − y)) over all distributions p*

Raises every loss, by λ · log(p_y / min_c p_c); a constant for the gradient. Source: Goibert & Dohmatob, "Adversarial Robustness via
Label-Smoothing", 2019; taxonomy eqs. 25–26.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def adversarially_smoothed(targets: jax.Array, log_probabilities: jax.Array, *, weight: ArrayLike) -> jax.Array:
    """y + λ(e_{argmin p} − y): [B, C], from targets y [B, C] and log p [B, C].

    >>> print(adversarially_smoothed(jnp.array([[0.0, 1.0, 0.0]]), jnp.log(jnp.array([[0.3, 0.6, 0.1]])), weight=0.1))
    [[0.  0.9 0.1]]
    """
    least = jnp.argmin(jax.lax.stop_gradient(log_probabilities), axis=-1)
    worst = jax.nn.one_hot(least, targets.shape[-1], dtype=targets.dtype)
    return targets + jnp.asarray(weight, targets.dtype) * (worst - targets)


@method(
    target="label", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Goibert & Dohmatob, 2019", off=dict(weight=0.0), alias="als",
)  # fmt: skip
def adversarial_label_smoothing(*, weight: ArrayLike = 0.1) -> Perturbation:
    """Adversarial label smoothing: targets move towards the least probable class, with λ = `weight` in [0, 1]."""
    check_number("adversarial_label_smoothing", low=0, high=1, weight=weight)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        targets = adversarially_smoothed(flow.value, flow.trace["prediction"], weight=weight)
        return flow._replace(value=targets), state, {}

    return Perturbation("label", lambda context: (), apply)
