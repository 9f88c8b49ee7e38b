r"""Symmetric cross entropy (SCE): cross entropy plus its reverse, in which target and prediction change places.

    α · CE(p, ŷ) + β · RCE,   RCE = −Σ_c p_c log ŷ_c  with log 0 := A        (one-hot: RCE = −A · (1 − p_y), bounded)

α and β are 0.1 and 1 for CIFAR-10, 6 and 0.1 for CIFAR-100. The official code clamps the labels at 1e-4: A = −9.21.
Source: Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def reverse_cross_entropy(log_probabilities: jax.Array, targets: jax.Array, *, log_zero: ArrayLike = -4.0) -> jax.Array:
    """−Σ_c p_c max(log ŷ_c, A): [B], from log p and ŷ [B, C].

    >>> print(reverse_cross_entropy(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([[1.0, 0.0]])))
    [1.]
    """
    floor = jnp.asarray(log_zero, targets.dtype)
    log_target = jnp.where(targets > 0, jnp.maximum(jnp.log(jnp.where(targets > 0, targets, 1)), floor), floor)
    return -jnp.sum(jnp.exp(log_probabilities) * log_target, axis=-1)


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Wang et al., ICCV 2019", off=dict(alpha=1.0, beta=0.0),
)  # fmt: skip
def sce(*, alpha: ArrayLike = 0.1, beta: ArrayLike = 1.0, log_zero: ArrayLike = -4.0) -> Perturbation:
    """Symmetric cross entropy: the loss so far times `alpha`, plus `beta` times the reverse cross entropy, for noisy labels.

    With the defaults it lowers large losses and raises small ones. log_zero: A < 0, what stands for log 0.
    """
    check_number("sce", low=0, alpha=alpha, beta=beta)
    check_number("sce", high=0, log_zero=log_zero)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        log_p = flow.trace["prediction"]
        reverse = reverse_cross_entropy(log_p, flow.targets.astype(log_p.dtype), log_zero=log_zero)
        weigh = lambda x: jnp.asarray(x, log_p.dtype)
        return flow._replace(value=weigh(alpha) * flow.value + weigh(beta) * reverse), state, {}

    return Perturbation("loss", lambda context: (), apply)
