r"""DisturbLabel: every time a sample is seen, its label is drawn anew with a small probability.

    with probability α:   Δy = e_c − y,   c uniform over all C classes (the true one included);   else 0

On average it is label smoothing with λ = α. The draw depends on the sample's position in the data set, not on its place in the batch
or on the number of devices. Source: Xie et al., "DisturbLabel: Regularizing CNN on the Loss Layer", CVPR 2016.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method


def disturbed_targets(key: jax.Array, index: jax.Array, targets: jax.Array, *, rate: ArrayLike) -> jax.Array:
    """The targets [B, C], each replaced by a random class with probability `rate`; index [B]: positions in the data set."""

    def draw(sample_key):
        whether, which = jax.random.split(sample_key)
        redrawn = jax.random.bernoulli(whether, jnp.asarray(rate, wide(targets).dtype))
        return redrawn, jax.random.randint(which, [], 0, targets.shape[-1])

    redrawn, label = jax.vmap(draw)(per_sample_keys(key, index))
    return jnp.where(redrawn[:, None], jax.nn.one_hot(label, targets.shape[-1], dtype=targets.dtype), targets)


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Xie et al., CVPR 2016", off=dict(rate=0.0), alias="disturb",
)  # fmt: skip
def disturb_label(*, rate: ArrayLike = 0.1) -> Perturbation:
    """DisturbLabel: draws the target anew, uniformly, with probability α = `rate`. Classes, as groups, stay those of the data."""
    check_number("disturb_label", low=0, high=1, rate=rate)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        return flow._replace(value=disturbed_targets(context.key, flow.index, flow.value, rate=rate)), state, {}

    return Perturbation("label", lambda context: (), apply)
