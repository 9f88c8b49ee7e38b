r"""Class-balanced fine-tuning: trains plainly, then goes on as if every class had as many samples as any other.

    w_c = 1 before, w_c = N/(C · N_c) in the last part of training

The original draws class-balanced samples in that part; the weights give the same expected gradient without drawing any sample twice
(our reading). It also takes a small learning rate there, a tenth of the last one: that is the learning rate's schedule, which is small
by then under "cosine"; with "step" give a milestone at the same place. Source: Cui et al., "Large Scale Fine-Grained
Categorization and Domain-Specific Transfer Learning", CVPR 2018.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method
from perturbjax.loss.class_weighting import class_weights


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="category",
    cite="Cui et al., CVPR 2018", off=None, alias="cbft",
)  # fmt: skip
def balanced_fine_tuning(*, start: ArrayLike = 0.9) -> Perturbation:
    """Class-balanced fine-tuning: all classes weigh the same in the last part of training, after the share `start` of it."""
    check_number("balanced_fine_tuning", low=0, high=1, start=start)

    def init(context: Context) -> tuple:
        class_weights(context.class_counts)  # a class without samples is found out here
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        factor = class_weights(context.class_counts)[flow.labels].astype(flow.weights.dtype)
        now = jnp.asarray(context.progress) >= start
        return flow._replace(weights=flow.weights * jnp.where(now, factor, 1)), state, {}

    return Perturbation("loss", init, apply, needs=("class_counts",))
