r"""Universal adversarial training (UAT): one delta for all images, which persists over batches and grows with the network.

    train at x_i + δ;    δ ← Π_{‖δ‖ ≤ ε}( δ + α · sign Σ_i ∇_x min(ℓ(x_i + δ), β) )        (x_i + δ clipped to the pixel range)

Both gradients are taken at the same point and XLA merges them into one pass, forward and backward: what is left is the first
layer's gradient with respect to the images.
Source: Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal Adversarial Training", AAAI 2020; taxonomy eq. 45.
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.feature.adversarial import Step, persistent_link
from perturbjax.link import Perturbation
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="feature", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Shafahi et al., AAAI 2020", off=dict(bound=0.0),
)  # fmt: skip
def uat(
    *,
    bound: ArrayLike = 8 / 255,
    step_size: ArrayLike = 2 / 255,
    num_steps: int = 1,
    norm: Norm = "linf",
    step: Step = "sign",
    clip_loss: ArrayLike = 9.0,
    update: Literal["after", "before"] = "after",
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    random_starts: bool = False,
) -> Perturbation:
    """UAT: one δ for the whole corpus, moved by one sign step on every batch. The state is δ.

    Args:
      bound: ε, in pixels of [0, 1] at the input (8/255), in units of the activation elsewhere.
      step_size: α, in the same units.
      num_steps: steps on each batch.
      norm: "linf", "l2" (then take step="unit") or "l1" ball.
      step: "sign", "unit" or "raw" steps.
      clip_loss: β: a sample whose loss is above it does not pull; inf: all pull.
      update: the batch trains at δ as it was, which is then moved from the same gradient's point (the paper), or δ is moved "before".
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites, the embedding of
        texts among them: no clipping.
      random_starts: δ starts as a random point of the ball instead of zero.

    Metrics: inner_evaluations.
    """
    return persistent_link(
        "uat", site, lambda flow, context, number: jnp.zeros(flow.labels.shape, jnp.int32), lambda context: 1, bound=bound, step_size=step_size,
        num_steps=num_steps, norm=norm, step=step, clip_loss=clip_loss, update=update, value_range=value_range,
        random_starts=random_starts,
    )  # fmt: skip
