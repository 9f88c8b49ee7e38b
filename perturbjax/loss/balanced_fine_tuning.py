r"""Class-balanced fine-tuning: trains plainly, then goes on, slowly, as if every class had as many samples as any other.

    samples    the last part on class-balanced batches, at a tenth of the learning rate: the original, a sampler and a schedule
    weights    w_c = 1 before, w_c = N/(C · N_c) in the last part: the same expected gradient from the usual batches

A link of the loss can draw no batches, so `samples` is carried out by the trainer (`perturbjax.training.FineTuning`, which the scripts set
for it) and is an error where nobody does. `weights` stands for it anywhere, without drawing any sample twice, as an approximation: rare
classes give few and heavy samples, and the learning rate is the schedule's own (small by then under "cosine"; with "step" give a milestone
at the same place). Source: Cui et al., "Large Scale Fine-Grained Categorization and Domain-Specific Transfer Learning", CVPR 2018.
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.loss.class_weighting import class_weights
from perturbjax.method import method

FORMS = ("weights", "samples")


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="category",
    cite="Cui et al., CVPR 2018", off=None, alias="cbft",
    asks=lambda settings: (
        {"fine_tuning": {"start": settings["start"], "rate": settings["rate"]}} if settings["form"] == "samples" else {}
    ),
)  # fmt: skip
def balanced_fine_tuning(
    *, form: Literal["weights", "samples"] = "weights", start: ArrayLike = 0.9, rate: ArrayLike = 0.1
) -> Perturbation:
    """Class-balanced fine-tuning: all classes count the same in the last part of training; form=samples is the original.

    Args:
      form: "samples" for class-balanced batches and a small learning rate, which need a trainer, or "weights" instead.
      start: share of training after which the last part begins; of "samples", in whole epochs.
      rate: of "samples": factor of the learning rate in that part.
    """
    check_choice("balanced_fine_tuning", "form", form, FORMS)
    check_number("balanced_fine_tuning", low=0, high=1, start=start)
    check_number("balanced_fine_tuning", low=0, rate=rate)

    def init(context: Context) -> tuple:
        class_weights(context.class_counts)  # a class without samples is found out here
        if form == "samples":
            given = context.balanced_from
            if given is None or not is_traced((given, start)) and abs(float(given) - float(start)) > 1e-6:
                raise ValueError(
                    f"balanced_fine_tuning needs class-balanced batches after the share {start} of training, got "
                    f"{'none' if given is None else f'them after {given}'}. Write Recipe(..., fine_tuning=FineTuning(start, rate)) for the "
                    "trainer, objective(..., balanced_from=start) for batches of your own, or form='weights'."
                )
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        if form == "samples":
            return flow, state, {}
        factor = class_weights(context.class_counts)[flow.labels].astype(flow.weights.dtype)
        return flow._replace(weights=flow.weights * jnp.where(context.begun(start), factor, 1)), state, {}

    return Perturbation("loss", init, apply, needs=("class_counts",))
