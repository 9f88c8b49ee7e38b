r"""Free adversarial training (free AT): each batch m times in a row, and every backward pass serves the weights and the deltas.

    for t = 1…m on one batch:  train at x_i + δ_b;   δ_b ← Π_{‖δ‖ ≤ ε}( δ_b + ε · sign ∇_x ℓ(x_i + δ_b) )      (i is the batch's b-th sample)

The delta belongs to a place in the batch and lives on: the next batch begins at that of the last one, which then is a random start. Over
m steps a sample meets m - 1 steps of PGD that share the passes of the training (but for the deltas' exchange between devices, and unless
a link behind searches, or the optimiser asks for another gradient); with as many steps in all, a run sees the data 1/m as often. The
batches' coming m times is the trainer's business (`Recipe.replays`, which the scripts set for this method), and an error where nobody sees
to it. A batch's augmentation is the same in all replays; links that mix or erase draw anew in each, so they go behind or are left out, and
what another method does by epochs happens every N/m samples. x + δ is clipped to the pixel range and the gradient taken there, as in
`uat`: a δ goes on growing where its pixel is at the edge.
Source: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein, "Adversarial Training for Free!", NeurIPS 2019,
algorithm 1.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.feature.adversarial import Step, persistent_link
from perturbjax.link import Context, Flow, Perturbation
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="feature", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Shafahi et al., NeurIPS 2019", off=dict(bound=0.0), asks=lambda settings: {"replays": settings["replays"]},
)  # fmt: skip
def free_at(
    *,
    bound: ArrayLike = 8 / 255,
    step_size: ArrayLike | None = None,
    replays: int = 8,
    norm: Norm = "linf",
    step: Step = "sign",
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    random_starts: bool = False,
) -> Perturbation:
    """Free AT: one δ for each place in the batch, moved by one step at the point where the weights' gradient is taken. The state is δ.

    Args:
      bound: ε, in pixels of [0, 1] at the input (8/255), in units of the activation elsewhere.
      step_size: α, in the same units; None: ε, as in the paper.
      replays: m, how often each batch is taken in a row. Numbers of steps and epochs stay those of plain training.
      norm: "linf", "l2" (then take step="unit") or "l1" ball.
      step: "sign", "unit" or "raw" steps.
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites, the embedding of
        texts among them: no clipping.
      random_starts: each δ starts as a random point of the ball instead of zero.

    Metrics: inner_evaluations.

    Raises:
      ValueError: at `init`, if batches are not promised to come `replays` times; at a step, for another number of samples than at `init`.
    """
    check_number("free_at", low=1, replays=replays)
    link = persistent_link(
        "free_at", site, places, lambda context: context.batch_size, bound=bound, step_size=bound if step_size is None else step_size,
        num_steps=1, norm=norm, step=step, clip_loss=jnp.inf, update="after", value_range=value_range, random_starts=random_starts,
    )  # fmt: skip

    def init(context: Context):
        if context.replays != replays:
            raise ValueError(
                f"free_at needs every batch {replays} times in a row, got replays={context.replays}. Write Recipe(..., replays={replays}) "
                f"for the trainer, objective(..., replays={replays}) for batches of your own."
            )
        return link.init(context)

    return link._replace(init=init)


def places(flow: Flow, context: Context, number: int) -> jax.Array:
    """[B] int32: each sample's place in the batch of all devices, of which there are `number`."""
    count, axis = flow.labels.shape[0], context.axis_name
    device = 0 if axis is None else jax.lax.axis_index(axis)
    if count * context.devices() != number:
        raise ValueError(
            f"free_at needs the number of samples that its deltas were made for, {number}, got {count * context.devices()}. Call init with a whole "
            "batch, that of all devices, drop the last partial one, and put links that add samples behind."
        )
    return jnp.int32(device) * count + jnp.arange(count, dtype=jnp.int32)
