r"""Representation self-challenging (RSC): mutes the features that the prediction of the true class leans on most.

    g_i = ∂u_{i,y_i}/∂a_i,    m_ij = 0 where g_ij is among the top share f of its sample,    ã_i = a_i ⊙ m_i
    only for the top share b of the batch by the drop of confidence,  p_{y}(a_i) − p_{y}(a_i ⊙ m_i);  the others stay as they are

"Among the top share s" means at or above the percentile 100(1 − s), as numpy interpolates it: the largest at least, and all ties.
Masks are constants for the gradient. f = b = 1/3. As a perturbation: δ = −a ⊙ (1 − m), which raises the loss.
Source: Huang et al., "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020; DomainBed.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import AxisName, number, own_entries, wide
from perturbjax.link import Context, Flow, Perturbation, Rest, clean_logits, searched_from
from perturbjax.method import method
from perturbjax.rounding import rounded_down


def top_share(values: jax.Array, *, share: ArrayLike, axis_name: AxisName = None) -> jax.Array:
    """Where `values` [..., N] are at or above their percentile 100·(1 − share) along the last axis: bool [..., N].

    share: in [0, 1]; 0 marks nothing. axis_name: mapped axis that the last axis is spread over, for the percentile over all.

    >>> print(top_share(jnp.array([3.0, 1.0, 2.0, 0.0]), share=1 / 3))
    [ True False  True False]
    """
    everyone = values if axis_name is None else jax.lax.all_gather(values, axis_name, axis=values.ndim - 1, tiled=True)
    last = everyone.shape[-1] - 1
    share = number(share)
    # Nothing lies between two neighbours in order, so the upper one serves as the interpolated percentile: ⌈(1 − share) · last⌉.
    position = jnp.clip(last - rounded_down(share * last), 0, last).astype(jnp.int32)
    threshold = jnp.take(jnp.sort(everyone, axis=-1), position, axis=-1)[..., None]
    return (values >= threshold) & (share > 0)


@method(
    target="activation", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Huang et al., ECCV 2020", off=dict(batch_share=0.0),
)  # fmt: skip
def rsc(
    *,
    feature_share: ArrayLike = 1 / 3,
    batch_share: ArrayLike = 1 / 3,
    of: Literal["logit", "loss"] = "logit",
    site: str = "features",
) -> Perturbation:
    """RSC: mutes the top share of each sample's features, for the share of the batch whose confidence suffers most.

    Args:
      feature_share: f in [0, 1], of a sample's features. batch_share: b in [0, 1], of the batch; 0 switches RSC off.
      of: features are ranked by the gradient of the true class's "logit" (the official code), or of −"loss".
      site: where; all entries of a sample there are ranked together.

    Costs one gradient and one more pass from the site on. Metrics: muted (share of all features), drop (of the confidence, mean).
    """
    check_number("rsc", low=0, high=1, feature_share=feature_share, batch_share=batch_share)
    check_choice("rsc", "of", of, ("logit", "loss"))

    def confidence(end: Flow) -> jax.Array:
        p = jax.nn.softmax(wide(end.trace["logits"]), axis=-1)
        return own_entries(p, end.labels)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        value = jax.lax.stop_gradient(flow.value)

        def score(value: jax.Array):
            losses, end = rest.flow(value)
            true = own_entries(end.trace["logits"], end.labels)
            return jnp.sum(true if of == "logit" else -losses), end

        slope, clean = jax.grad(score, has_aux=True)(value)
        top = top_share(wide(slope).reshape(value.shape[0], -1), share=feature_share).reshape(value.shape)
        drop = confidence(clean) - confidence(rest.flow(jnp.where(top, 0, value))[1])
        chosen = top_share(drop, share=batch_share, axis_name=context.axis_name)
        muted = jax.lax.stop_gradient(top & chosen.reshape(-1, *[1] * (value.ndim - 1)))
        metrics = {
            "muted": jnp.mean(muted.astype(jnp.float32)),
            "drop": jax.lax.stop_gradient(drop).mean(),
            "inner_evaluations": jnp.float32(1.5),  # the slope, and one more forward pass
        }
        flow = searched_from(flow, clean_logits(clean, clean.trace["logits"]))
        return flow._replace(value=jnp.where(muted, 0, flow.value)), state, metrics

    return Perturbation(site, lambda context: (), apply, search=True)
