r"""ProSelfLC: the target moves from the label to the net's own prediction, more as training goes on and the surer the net is.

    ε_i = σ(B (t/T − t₀)) · (1 − H(p_i)/log C),    target (1 − ε_i) y + ε_i p_i

The first factor is trust in the net as such, the second in this prediction. ε is a constant for the gradient. So is p here; the
authors' code lets the gradient through p in the target, which sharpens predictions: `through`.
Source: Wang et al., "ProSelfLC: Progressive Self Label Correction for Training Robust Deep Neural Networks", CVPR 2021.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def self_trust(
    log_probabilities: jax.Array, progress: ArrayLike, *, sharpness: ArrayLike = 6.0, turning: ArrayLike = 0.3
) -> jax.Array:
    """ε: [B] in [0, 1], from log p [B, C] and t/T; a constant for the gradient.

    >>> print(self_trust(jnp.log(jnp.array([[0.5, 0.5], [0.999, 0.001]])), 0.5, turning=0.5).round(2))
    [0.   0.49]
    """
    log_p = jax.lax.stop_gradient(log_probabilities)
    dtype = log_p.dtype
    here = jnp.asarray(sharpness, dtype) * (jnp.asarray(progress, dtype) - jnp.asarray(turning, dtype))
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
    sure = jnp.clip(1 - entropy / jnp.log(jnp.asarray(log_p.shape[-1], dtype)), 0, 1)
    return jax.nn.sigmoid(here) * sure


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Wang et al., CVPR 2021", off=dict(turning=float("inf")),
)  # fmt: skip
def proselflc(*, sharpness: ArrayLike = 6.0, turning: ArrayLike = 0.3, through: bool = False) -> Perturbation:
    """ProSelfLC: replaces labels by the net's own predictions as training goes on, where it is sure.

    Args:
      sharpness: B; the authors search 4…14.
      turning: t₀, the share of training after which the net is trusted; 0.2…0.7.
      through: let the gradient through p in the target, as the official code does.

    Metrics: trust, the mean ε.
    """
    check_number("proselflc", low=0, open_low=True, sharpness=sharpness)
    check_number("proselflc", low=0, infinite=True, turning=turning)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        log_p = flow.trace["prediction"] if through else jax.lax.stop_gradient(flow.trace["prediction"])
        eps = self_trust(log_p, context.progress, sharpness=sharpness, turning=turning)
        own = jnp.exp(log_p).astype(flow.value.dtype)
        targets = flow.value + eps.astype(own.dtype)[:, None] * (own - flow.value)
        return flow._replace(value=targets), state, {"trust": jnp.mean(eps)}

    return Perturbation("label", lambda context: (), apply)
