r"""Adversarial training (AT): trains on the input that projected gradient ascent finds within a ball around each sample.

    δ⁰ ~ U(−ε, ε);   δ ← Π_{‖δ‖ ≤ ε}( δ + α · sign ∇_x ℓ(x + δ) ),   x + δ clipped to the pixel range

Fast AT (Wong et al., ICLR 2020) is one step of 1.25 ε from a random start: adversarial_training(bound=8/255, step_size=10/255,
num_steps=1). Free AT, whose δ outlives the batch and which draws each batch several times, is `free_at`.
Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; taxonomy eq. 31.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.feature.adversarial import Step, check_ball, pixel_range, random_start, require_floats, site_shape
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="feature", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Madry et al., ICLR 2018", off=dict(bound=0.0), alias="at",
)  # fmt: skip
def adversarial_training(
    *,
    bound: ArrayLike = 8 / 255,
    step_size: ArrayLike = 2 / 255,
    num_steps: int = 7,
    norm: Norm = "linf",
    step: Step = "sign",
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    random_starts: bool = True,
) -> Perturbation:
    """AT with `num_steps` steps of PGD on every sample.

    Args:
      bound: ε, in pixels of [0, 1] at the input (8/255), in units of the activation elsewhere.
      step_size: α, in the same units.
      num_steps: K.
      norm: "linf", "l2" (then take step="unit") or "l1" ball.
      step: "sign", "unit" or "raw" steps.
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites, the embedding of
        texts among them: no clipping.
      random_starts: start from a random point, drawn by each sample's position in the data set, instead of zero.

    Metrics: inner_evaluations.
    """
    check_ball(
        "adversarial_training", norm=norm, step=step, site=site, value_range=value_range, bound=bound, step_size=step_size
    )
    check_number("adversarial_training", low=0, num_steps=num_steps)

    def init(context: Context) -> tuple:
        site_shape("adversarial_training", context, norm=norm, value_range=value_range, bound=bound)
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        require_floats("adversarial_training", flow.value, site)
        shape, count = flow.value.shape[1:], flow.labels.shape[0]
        start = random_start(context.key, flow.index, shape, bound=bound, norm=norm) if random_starts else None
        delta, _ = pgd(
            rest, flow.value, None, count, step_size=step_size, num_steps=num_steps, bound=bound, step=step, norm=norm,
            start=start, value_range=pixel_range(value_range, context), axis_name=context.axis_name,
        )  # fmt: skip
        return flow._replace(value=flow.value + delta), state, {"inner_evaluations": jnp.int32(num_steps)}

    return Perturbation(site, init, apply, search=True)
