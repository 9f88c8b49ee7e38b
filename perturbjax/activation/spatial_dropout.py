r"""Spatial dropout: dropout of whole channels; all positions of a sample's channel share one draw.

    ã_{p,k} = a_{p,k} · m_k/(1 − rate),   m_k ~ Bernoulli(1 − rate) for each sample and channel k, at all its positions p

Neighbouring positions say much the same, so that single entries that are missing can be guessed from those around; a channel can't.
The last axis has the channels. Evaluation needs nothing, and the draws follow the sample's position in the data set, as in `dropout`,
which this is for vectors [B, d].
Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR 2015.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.activation.dropout import dropout_mask
from perturbjax.checks import check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


@method(
    target="activation", direction=(), inference="prior", granularity="sample",
    cite="Tompson et al., CVPR 2015", off=dict(rate=0.0),
)  # fmt: skip
def spatial_dropout(*, rate: ArrayLike = 0.2, site: str = "last_stage") -> Perturbation:
    """Dropout of channels with probability `rate`, of the activation [B, ..., channels] at `site`."""
    check_number("spatial_dropout", low=0, high=0.999, rate=rate)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        mask = dropout_mask(
            context.key, flow.index, flow.value.shape[-1:], rate=jnp.asarray(rate, context.dtype)
        )  # [B, channels]
        mask = jnp.expand_dims(mask.astype(flow.value.dtype), tuple(range(1, flow.value.ndim - 1)))
        return flow._replace(value=flow.value * mask), state, {}

    return Perturbation(site, lambda context: (), apply)
