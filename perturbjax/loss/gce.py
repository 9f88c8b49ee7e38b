r"""Generalised cross entropy (GCE, the L_q loss): between cross entropy (q → 0) and the mean absolute error (q = 1).

    L_q(p) = (1 − p_y^q)/q,   truncated: L_q(max(p_y, k))

The truncated loss is constant, without gradient, where p_y ≤ k: it is what alternating between the weights [p_y > k] and the
network minimises. Soft targets take Σ_c ŷ_c L_q(p_c). Source: Zhang & Sabuncu, "Generalized Cross Entropy Loss
for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, is_traced
from perturbjax.classes import own_entries
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def gce_terms(log_probabilities: jax.Array, *, q: ArrayLike = 0.7, truncate: ArrayLike = 0.0) -> jax.Array:
    """L_q of every class, [..., C] from log p [..., C]; −log p at q = 0.

    >>> print(gce_terms(jnp.log(jnp.array([0.25, 0.64])), q=0.5).round(3))
    [1.  0.4]
    """
    dtype = log_probabilities.dtype
    q, floor = jnp.asarray(q, dtype), jnp.log(jnp.asarray(truncate, dtype))
    log_p = jnp.maximum(log_probabilities, floor)
    safe = jnp.where(q > 0, q, 1)
    return jnp.where(q > 0, -jnp.expm1(safe * log_p) / safe, -log_p)  # expm1 keeps the digits where p^q is near 1


@method(
    target="loss", direction=(-1,), inference="prior", granularity="sample",
    cite="Zhang & Sabuncu, NeurIPS 2018", off=dict(q=0.0),
)  # fmt: skip
def gce(*, q: ArrayLike = 0.7, truncate: ArrayLike = 0.0, start: ArrayLike = 1 / 3) -> Perturbation:
    """Generalised cross entropy (L_q): samples that the net finds improbable count less, for noisy labels.

    Replaces the cross entropy, so it comes before the other links of the loss.

    Args:
      q: 0 is cross entropy, 1 the mean absolute error.
      truncate: k: samples with p_y ≤ k have no gradient; 0: none are dropped, the paper's L_q. Its truncated loss is gce(truncate=0.5):
        not the default, since it prunes by what the net says at `start`, which has to fit the run.
      start: share of training after which the truncation acts: at first every p_y is small. The official code's 40 of 120 epochs.
        It prunes by the predictions of a stored net, every tenth epoch; here the present one decides, at every step.

    Metrics: kept, the share of samples with p_y > k.
    """
    check_number("gce", low=0, high=1, q=q, start=start)
    check_number("gce", low=0, high=1 - 1e-6, truncate=truncate)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        log_p = flow.trace["prediction"]
        truncates = is_traced(truncate) or np.any(np.asarray(truncate) > 0)
        k = jnp.asarray(jnp.where(context.begun(start), truncate, 0) if truncates else 0, log_p.dtype)
        losses = jnp.sum(flow.targets * gce_terms(log_p, q=q, truncate=k), axis=-1)
        own = own_entries(log_p, flow.labels)
        kept = jnp.mean((own > jnp.log(k)).astype(jnp.float32))
        return flow._replace(value=losses), state, {"kept": kept}

    return Perturbation("loss", lambda context: (), apply)
