r"""Class-wise universal adversarial training (C-UAT): one delta per class, which persists over batches.

    train at x_i + δ_{y_i};    δ_c ← Π_{‖δ‖ ≤ ε}( δ_c + α · sign Σ_{i: y_i = c} ∇_x min(ℓ(x_i + δ_c), β) )

A class absent from the batch keeps its delta. Other groups of samples (domains) take the place of the classes with `groups`.
Source: Benz, Zhang, Karjauv, Kweon, "Universal Adversarial Training with Class-Wise Perturbations", ICME 2021; taxonomy eq. 46.
"""

from typing import Literal

import jax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.feature.adversarial import Step, group_number, persistent_link
from perturbjax.link import Context, Flow, Perturbation
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="feature", direction=(+1,), inference="adversarial", granularity="category",
    cite="Benz et al., ICME 2021", off=dict(bound=0.0), alias="c-uat",
)  # fmt: skip
def cuat(
    *,
    bound: ArrayLike = 8 / 255,
    step_size: ArrayLike = 2 / 255,
    groups: str = "class",
    num_groups: int | None = None,
    num_steps: int = 1,
    norm: Norm = "linf",
    step: Step = "sign",
    clip_loss: ArrayLike = 9.0,
    update: Literal["after", "before"] = "after",
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    random_starts: bool = False,
) -> Perturbation:
    """C-UAT: one δ_c per class, moved by one sign step on the class's samples of every batch. The state is δ.

    Args:
      bound: ε, in pixels of [0, 1] at the input (8/255), in units of the activation elsewhere.
      step_size: α, in the same units.
      groups: who shares a delta: "class", "domain" (the batch's side["domain"], numbered up to the objective's num_domains), or
        the name of any other side information with whole numbers.
      num_groups: how many of these there are; None: known for classes and domains.
      num_steps: steps on each batch.
      norm: "linf", "l2" (then take step="unit") or "l1" ball.
      step: "sign", "unit" or "raw" steps.
      clip_loss: β: a sample whose loss is above it does not pull; inf: all pull.
      update: the batch trains at δ as it was, which is then moved from the same gradient's point (the paper), or δ is moved "before".
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites, the embedding of
        texts among them: no clipping.
      random_starts: each δ starts as a random point of the ball instead of zero.

    Metrics: inner_evaluations.
    """
    check_number("cuat", low=1, num_groups=num_groups)

    def number_of(context: Context) -> int:
        known = {"class": context.num_classes, "domain": context.num_domains}
        return group_number("cuat", groups, num_groups, known.get(groups))

    def groups_of(flow: Flow, context: Context, number: int) -> jax.Array:
        if groups == "class":
            return flow.labels
        if groups not in flow.side:
            raise ValueError(
                f"cuat needs side[{groups!r}], got {sorted(flow.side) or 'none'}. "
                f"Pass pj.batch(..., side={{{groups!r}: numbers}}), or write groups='class'."
            )
        return flow.side[groups]

    return persistent_link(
        "cuat", site, groups_of, number_of, bound=bound, step_size=step_size, num_steps=num_steps, norm=norm, step=step,
        clip_loss=clip_loss, update=update, value_range=value_range, random_starts=random_starts,
    )  # fmt: skip
