r"""Self-paced logit perturbation: hard samples are lifted over the whole way at first, and fewer of them as training goes on.

    u_i + v_i   with   v_i = ε (2ŷ_i − 1) if l_i ≥ τ_t, else 0,     ε > 2 max_i ‖u_i‖∞,     τ_{t+1} > τ_t

v_i is the minimum over the l∞ ball (eq. 56), wide enough to bring any sample's loss near zero: its weight is then 1 below τ and about
0 above, as in self-paced learning (eqs. 63–65). How τ grows is open in the paper; here τ = tau · log C · (1 + growth · progress). While
every loss is above τ nothing is learnt: with a small τ training begins plainly, for the share `start`.
Source: taxonomy paper, section 6.5, extension (1); Kumar, Packer, Koller, NIPS 2010.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, check_samples, is_traced
from perturbjax.classes import AxisName, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def self_paced_logit_delta(
    logits: jax.Array, labels: jax.Array, *, tau: ArrayLike, scale: ArrayLike = 2.5, axis_name: AxisName = None
) -> jax.Array:
    """v: [B, C], zero for the samples whose cross entropy is below τ; a constant for the gradient.

    Args:
      logits: [B, C], any float type (computed in at least float32). labels: [B] integers in 0..C-1.
      tau: τ, a loss.
      scale: ε over the largest |u| of the batch (of all devices with axis_name); eq. 65 wants more than 2.

    >>> print(self_paced_logit_delta(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1, 1]), tau=1.0))
    [[-5.  5.]
     [ 0.  0.]]
    """
    check_samples("self_paced_logit_delta", logits, labels)
    return _lift(logits, labels, tau, scale, axis_name)


def _lift(logits: jax.Array, labels: jax.Array, tau: ArrayLike, scale: ArrayLike, axis_name: AxisName) -> jax.Array:
    u = wide(jax.lax.stop_gradient(logits))
    own = jax.nn.one_hot(labels, u.shape[-1], dtype=u.dtype)
    losses = -jnp.sum(own * jax.nn.log_softmax(u), axis=-1)
    largest = jnp.max(jnp.abs(u)) if axis_name is None else jax.lax.pmax(jnp.max(jnp.abs(u)), axis_name)
    eps = jnp.asarray(scale, u.dtype) * largest
    return jnp.where((losses >= jnp.asarray(tau, u.dtype))[:, None], eps * (2 * own - 1), 0)


@method(
    target="logit", direction=(-1,), inference="adversarial", granularity="sample",
    cite="taxonomy paper, section 6.5", off=dict(tau=float("inf")),
)  # fmt: skip
def self_paced_logit(
    *, tau: ArrayLike = 1.5, growth: ArrayLike = 1.0, scale: ArrayLike = 2.5, start: ArrayLike = 0.0
) -> Perturbation:
    """Self-paced logit perturbation: takes the hard samples out at first, by their logits, and lets them in as training goes on.

    Args:
      tau: threshold of the loss at the start, in units of log C, the loss of knowing nothing; inf: plain training. Up to 1 every sample
        of an untrained net would be out and nothing be learnt: an error, unless training begins without (`start`).
      growth: > 0; τ has grown by the factor 1 + growth at the end of training.
      scale: > 2; ε over the batch's largest |logit|.
      start: share of training that is plain; anything above 0 for a net that is trained already.

    Raises:
      ValueError: tau <= 1 with start = 0.

    Metrics: taken_in, the share of samples with l < τ; threshold, τ.
    """
    check_number("self_paced_logit", low=0, infinite=True, tau=tau)
    check_number("self_paced_logit", low=0, open_low=True, growth=growth)
    check_number("self_paced_logit", low=2, open_low=True, scale=scale)
    check_number("self_paced_logit", low=0, high=1, start=start)
    if not is_traced((tau, start)) and np.min(tau) <= 1 and np.min(start) <= 0:
        raise ValueError(
            f"self_paced_logit needs tau > 1 from the first step on, got {tau}: an untrained net's losses are about log C, tau = 1, so that "
            f"every sample would be out and nothing be learnt. Write tau=1.5, or tau={tau}, start=0.2, plain training before."
        )

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        pace = 1 + jnp.asarray(growth, context.dtype) * jnp.asarray(context.progress, context.dtype)
        threshold = jnp.asarray(tau, context.dtype) * jnp.log(float(context.num_classes)) * pace
        threshold = jnp.where(context.begun(start), threshold, jnp.inf)
        delta = _lift(flow.value, flow.labels, threshold, scale, context.axis_name)
        left = jnp.mean((delta == 0).all(axis=-1).astype(jnp.float32))
        return flow._replace(value=flow.value + delta), state, {"taken_in": left, "threshold": threshold}

    return Perturbation("logits", lambda context: (), apply, reads_labels=True)
