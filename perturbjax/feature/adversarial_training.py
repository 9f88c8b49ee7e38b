r"""Adversarial training (AT): trains on the input that projected gradient ascent finds within a ball around each sample.

    δ⁰ ~ U(−ε, ε);   δ ← Π_{‖δ‖ ≤ ε}( δ + α · sign ∇_x ℓ(x + δ) ),   x + δ clipped to the pixel range

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; taxonomy eq. 31.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.core import Context, Flow, Perturbation, Rest, method, per_sample_keys
from perturbjax.inference.pgd import pgd
from perturbjax.projection import NORMS, Norm, project


def random_start(key: jax.Array, index: jax.Array, shape: tuple[int, ...], *, bound: ArrayLike, norm: Norm) -> jax.Array:
    """A random delta for each sample, [B, *shape]: uniform in the cube of half-width `bound`, projected onto the ball."""
    draw = lambda k: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0)
    cube = bound * jax.vmap(draw)(per_sample_keys(key, index))
    return project(cube, jnp.broadcast_to(jnp.asarray(bound, cube.dtype), index.shape), norm)


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
    step: Literal["sign", "unit", "raw"] = "sign",
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
    check_number("adversarial_training", low=0, bound=bound, step_size=step_size, num_steps=num_steps)
    check_choice("adversarial_training", "norm", norm, NORMS)
    check_choice("adversarial_training", "step", step, ("sign", "unit", "raw"))
    if site == "input" and value_range is not None and not is_traced(value_range) and norm == "linf":
        check_number("adversarial_training", high=value_range[1] - value_range[0], bound=bound)

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        shape, count = flow.value.shape[1:], flow.labels.shape[0]
        clip_to = value_range if context.site == "input" else None
        start = random_start(context.key, flow.index, shape, bound=bound, norm=norm) if random_starts else None
        delta, _ = pgd(
            rest, flow.value, None, count, step_size=step_size, num_steps=num_steps, bound=bound, step=step, norm=norm,
            start=start, value_range=clip_to, axis_name=context.axis_name,
        )  # fmt: skip
        return flow._replace(value=flow.value + delta), state, {"inner_evaluations": jnp.int32(num_steps)}

    return Perturbation(site, lambda context: (), apply, search=True)
