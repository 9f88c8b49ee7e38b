r"""Dropout at a named site: every entry of the activation is zeroed with probability `rate`, the others are scaled up.

    ã = a ⊙ m/(1 − rate),   m ~ Bernoulli(1 − rate)          as a perturbation: δ = a ⊙ (m/(1 − rate) − 1)

Evaluation needs nothing. The mask of a sample depends on its position in the data set, not on its place in the batch or on the
number of devices. Source: Srivastava et al., JMLR 2014; LPA eq. 3 (which prints the unscaled form).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import number
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method


def dropout_mask(key: jax.Array, index: jax.Array, shape: tuple[int, ...], *, rate: ArrayLike) -> jax.Array:
    """m/(1 − rate): [B, *shape], of the type of the rate; 0 or 1/(1 − rate)."""
    keep = 1 - number(rate)
    kept = jax.vmap(lambda k: jax.random.bernoulli(k, keep, shape))(per_sample_keys(key, index))
    return kept.astype(keep.dtype) / keep


@method(
    target="activation", direction=(), inference="prior", granularity="sample",
    cite="Srivastava et al., JMLR 2014", off=dict(rate=0.0),
)  # fmt: skip
def dropout(*, rate: ArrayLike = 0.5, site: str = "features") -> Perturbation:
    """Dropout with probability `rate` of the activation at `site` (0.5 before the head, 0.2…0.3 inside networks)."""
    check_number("dropout", low=0, high=0.999, rate=rate)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        mask = dropout_mask(context.key, flow.index, flow.value.shape[1:], rate=jnp.asarray(rate, context.dtype))
        return flow._replace(value=flow.value * mask.astype(flow.value.dtype)), state, {}

    return Perturbation(site, lambda context: (), apply)
