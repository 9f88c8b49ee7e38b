r"""Deep abstaining classifier (DAC): the net may abstain from a sample, at a price that rises during training.

    p = softmax over C + 1 outputs, p₀ that of the last one;   ℓ the cross entropy over the C classes alone
    first                     ℓ − log(1 − p₀), which is the cross entropy over C + 1 outputs;   α̃ ← 0.95 α̃ + 0.05 · mean (1 − p₀) ℓ
    later                     (1 − p₀) · ℓ − α · log(1 − p₀),   α from α̃/64 linearly to its final value at the end of training

The extra output is the model's: its site "outputs" holds [B, C + 1], its site "logits" the first C of them, which everything else
(prediction, evaluation, other links) goes by. α rises at every step here, at every epoch in the official code.
Source: Thulasidasan et al., "Combating Label Noise in Deep Learning Using Abstention", ICML 2019.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


class DACState(NamedTuple):
    """What the next step needs."""

    threshold: jax.Array  # [], α̃, the running mean of (1 − p₀)·ℓ over the first part
    seen: jax.Array  # [] bool, whether it holds anything yet


def log_real(logits: jax.Array, abstention: jax.Array) -> jax.Array:
    """log(1 − p₀): [B], from the logits of the classes [B, C] and of abstention [B].

    >>> print(jnp.exp(log_real(jnp.zeros([1, 2]), jnp.array([0.0]))).round(3))
    [0.667]
    """
    return -jax.nn.softplus(abstention - jax.nn.logsumexp(logits, axis=-1))


def dac_losses(losses: jax.Array, log_real: jax.Array, alpha: ArrayLike) -> jax.Array:
    """(1 − p₀)·ℓ − α·log(1 − p₀), from ℓ [B] and log(1 − p₀) [B]."""
    return jnp.exp(log_real) * losses - jnp.asarray(alpha, losses.dtype) * log_real


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Thulasidasan et al., ICML 2019", off=None,
)  # fmt: skip
def dac(*, start: ArrayLike = 0.1, weight: ArrayLike = 1.0, factor: ArrayLike = 64.0, decay: ArrayLike = 0.95) -> Perturbation:
    """Deep abstaining classifier: an extra output takes the samples that can't be learnt, such as wrongly labelled ones.

    Needs a model with the site "outputs", [B, C + 1], before its logits.

    Args:
      start: share of training after which it may abstain; before, it learns what an ordinary loss is.
      weight: α at the end. factor: α starts at α̃ divided by this. decay: of the running mean α̃.

    Metrics: abstained, the share of samples whose largest output is the extra one; alpha (0 at first).
    """
    check_number("dac", low=0, high=1 - 1e-6, start=start)
    check_number("dac", low=0, weight=weight)
    check_number("dac", low=0, open_low=True, factor=factor)
    check_number("dac", low=0, high=1, decay=decay)

    def init(context: Context) -> DACState:
        shape, wanted = context.site_shapes["outputs"], context.num_classes + 1
        if len(shape) != 2 or shape[1] != wanted:
            raise ValueError(
                f"dac needs outputs [B, C + 1] = [B, {wanted}], got {shape}. Put abstention's output after those of the classes."
            )
        return DACState(jnp.zeros([], context.dtype), jnp.zeros([], bool))

    def apply(flow: Flow, rest: Rest, state: DACState, context: Context):
        logits, abstention = flow.trace["logits"], wide(flow.trace["outputs"])[:, -1]
        real = log_real(logits, abstention.astype(logits.dtype))
        progress, begin = (jnp.asarray(x, state.threshold.dtype) for x in (context.progress, start))
        first = ~context.begun(start)

        now = jax.lax.stop_gradient(jnp.mean(jnp.exp(real) * flow.value)).astype(state.threshold.dtype)
        if context.axis_name is not None:
            now = jax.lax.pmean(now, context.axis_name)
        rate = jnp.asarray(decay, now.dtype)
        moved = jnp.where(state.seen, rate * state.threshold + (1 - rate) * now, now)
        after = DACState(jnp.where(first | ~state.seen, moved, state.threshold), jnp.ones([], bool))

        low, high = after.threshold / jnp.asarray(factor, now.dtype), jnp.asarray(weight, now.dtype)
        alpha = low + (high - low) * jnp.clip((progress - begin) / (1 - begin), 0, 1)
        losses = jnp.where(first, flow.value - real, dac_losses(flow.value, real, alpha))
        abstained = jnp.mean((abstention > logits.max(axis=-1)).astype(jnp.float32))
        metrics = {"abstained": abstained, "alpha": jnp.where(first, 0, alpha)}
        return flow._replace(value=losses), after, metrics

    return Perturbation("loss", init, apply, needs=("outputs",))
