r"""LPG's generalization bound: what larger perturbation bounds cost.

    L(W) ≤ L̂_LPG(W) + √( (KL(Q‖P) + log(2N/β)) / (2N) ) + λ · Σ_c (N_c/N)·ε_c        (Proposition 2, eq. 24)

The paper sketches the proof; λ, a constant of the loss and the network (their Lipschitz constants), is given no value there, so it
is an argument here. `lpg` logs the sum as its metric bound_term. Source: LPG, Proposition 2.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import number


def lpg_bound_term(bound: ArrayLike, class_counts: ArrayLike) -> jax.Array:
    """Σ_c (N_c/N)·ε_c: []. bound: ε_c, a number or [C]. class_counts: N_c [C].

    >>> print(lpg_bound_term(jnp.array([0.1, 0.4]), jnp.array([30, 10])))
    0.175
    """
    bound = number(bound)
    counts = jnp.asarray(class_counts).astype(bound.dtype)
    share = counts / jnp.maximum(counts.sum(), 1)
    return jnp.sum(share * jnp.broadcast_to(bound, share.shape))


def lpg_generalization_bound(
    risk: ArrayLike,
    divergence: ArrayLike,
    *,
    bound: ArrayLike,
    class_counts: ArrayLike,
    weight: ArrayLike,
    beta: ArrayLike = 0.05,
) -> jax.Array:
    """The right-hand side of eq. 24: [].

    Args:
      risk: L̂_LPG(W), the mean training loss under LPG; the theorem's losses lie in [0, 1].
      divergence: KL(Q‖P) >= 0 in nats, of the trained parameters' distribution from the prior.
      bound: ε_c, a number or [C]. class_counts: N_c [C]; N is their sum.
      weight: λ >= 0. beta: β in (0, 1], the probability with which the bound may fail.

    Raises:
      ValueError: a number outside its range.

    >>> print(lpg_generalization_bound(0.1, 5.0, bound=0.2, class_counts=jnp.array([600, 400]), weight=0.5).round(4))
    0.2883
    """
    check_number(
        "lpg_generalization_bound", low=0, divergence=divergence, bound=bound, weight=weight, class_counts=class_counts
    )
    check_number("lpg_generalization_bound", low=0, high=1, open_low=True, beta=beta)
    risk = number(risk)
    total = jnp.asarray(class_counts).astype(risk.dtype).sum()
    gap = jnp.sqrt((divergence + jnp.log(2 * total / beta)) / (2 * total))
    return risk + gap + weight * lpg_bound_term(jnp.asarray(bound, risk.dtype), class_counts)
