r"""Logit adjustment (LA): one shift of the logits for the whole corpus, by the class prior, inside the training loss only.

    u + τ · log π,    π_c = N_c/N

Lowers the losses of frequent classes and raises those of rare ones. Balanced softmax, −log(n_y e^{u_y} / Σ_c n_c e^{u_c}), is τ = 1.
Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021; LPL eqs. 2–4, taxonomy eq. 12;
Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_class_counts, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def logit_adjustment_delta(class_counts: ArrayLike, *, tau: ArrayLike = 1.0) -> jax.Array:
    """τ·log π: [C], to be added to the logits during training (with −τ: to those of a plainly trained net, at evaluation).

    Raises:
      ValueError: a class without samples (log 0).

    >>> print(logit_adjustment_delta(jnp.array([75, 25])))
    [-0.288 -1.386]
    """
    check_class_counts("logit_adjustment", class_counts)
    counts = jnp.asarray(class_counts, float)
    return jnp.asarray(tau, counts.dtype) * jnp.log(counts / counts.sum())


@method(
    target="logit", direction=(+1, -1), inference="prior", granularity="corpus",
    cite="Menon et al., ICLR 2021", off=dict(tau=0.0), alias="la",
)  # fmt: skip
def logit_adjustment(*, tau: ArrayLike = 1.0) -> Perturbation:
    """LA: adds τ times the log prior to the training logits, so that rare classes must win by more.

    Args:
      tau: τ (the papers search 0.5…2.5). Evaluation uses the plain logits.
    """
    check_number("logit_adjustment", tau=tau)

    def init(context: Context) -> jax.Array:
        return logit_adjustment_delta(context.class_counts)  # log π [C]; here a class without samples is found out

    def apply(flow: Flow, rest: Rest, state: jax.Array, context: Context):
        shift = (jnp.asarray(tau, state.dtype) * state).astype(flow.value.dtype)
        return flow._replace(value=flow.value + shift[None]), state, {}

    return Perturbation("logits", init, apply, needs=("class_counts",))


@method(
    target="logit", direction=(+1, -1), inference="prior", granularity="corpus",
    cite="Ren et al., NeurIPS 2020", off=None,
)  # fmt: skip
def balanced_softmax() -> Perturbation:
    """Balanced softmax: logit adjustment with τ = 1, under its other name."""
    return logit_adjustment(tau=1.0)
