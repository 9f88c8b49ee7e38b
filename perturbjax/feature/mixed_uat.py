r"""Mixed-level adversarial training: a delta for the corpus, which persists, and from there one for each sample.

    δ* ← Π_{‖δ‖ ≤ ε*}( δ* + α* · sign Σ_i ∇_x min(ℓ(x_i + δ*), β) )        as in UAT
    δ_i = argmax_{‖δ‖ ≤ ε_i} ℓ(x_i + δ* + δ)                                by PGD from δ = 0, anew at every batch

The network trains at x_i + δ* + δ_i, clipped to the pixel range. The paper prints no bounds: here ε* and ε_i are half of the
usual 8/255 each. Source: taxonomy, section 4.5.2, eq. 47.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.feature.adversarial import (
    PersistentDelta,
    Step,
    check_ball,
    group_ascent,
    persistent_init,
    pixel_range,
    random_start,
    require_floats,
    require_shape,
    shifted,
    site_shape,
)
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="feature", direction=(+1,), inference="adversarial", granularity=("corpus", "sample"),
    cite="taxonomy, eq. 47", off=dict(bound=0.0, universal_bound=0.0),
)  # fmt: skip
def mixed_uat(
    *,
    bound: ArrayLike = 4 / 255,
    universal_bound: ArrayLike = 4 / 255,
    step_size: ArrayLike = 1 / 255,
    universal_step_size: ArrayLike = 1 / 255,
    num_steps: int = 7,
    universal_steps: int = 1,
    norm: Norm = "linf",
    step: Step = "sign",
    clip_loss: ArrayLike = 9.0,
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    random_starts: bool = False,
) -> Perturbation:
    """Corpus and sample in one delta: PGD on every sample from x + δ*, where δ* persists as in UAT. The state is δ*.

    Args:
      bound, universal_bound: ε_i and ε*, in pixels of [0, 1] at the input, in units of the activation elsewhere.
      step_size, universal_step_size: α of each, in the same units.
      num_steps, universal_steps: steps of each on a batch; the batch trains at δ* as it was before them.
      norm: "linf", "l2" (then take step="unit") or "l1" balls.
      step: "sign", "unit" or "raw" steps.
      clip_loss: β: a sample whose loss is above it does not pull at δ*; inf: all pull.
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites, the embedding of
        texts among them: no clipping.
      random_starts: δ_i starts from a random point, drawn by the sample's position in the data set, instead of zero.

    Metrics: inner_evaluations.
    """
    sizes = dict(bound=bound, universal_bound=universal_bound)
    check_ball(
        "mixed_uat", norm=norm, step=step, site=site, value_range=value_range, **sizes, step_size=step_size,
        universal_step_size=universal_step_size,
    )  # fmt: skip
    check_number("mixed_uat", low=1, num_steps=num_steps, universal_steps=universal_steps)
    check_number("mixed_uat", low=0, open_low=True, infinite=True, clip_loss=clip_loss)

    def init(context: Context) -> PersistentDelta:
        return persistent_init(1, site_shape("mixed_uat", context, norm=norm, value_range=value_range, **sizes), context.dtype)

    def apply(flow: Flow, rest: Rest, state: PersistentDelta, context: Context):
        require_floats("mixed_uat", flow.value, site)
        require_shape("mixed_uat", flow.value, state.delta, site)
        count, span = flow.labels.shape[0], pixel_range(value_range, context)
        everyone = jnp.zeros([count], jnp.int32)
        base = shifted(flow.value, state.delta, everyone, value_range=span)
        after = group_ascent(
            rest, flow.value, state.delta, everyone, bound=universal_bound, step_size=universal_step_size, num_steps=universal_steps,
            norm=norm, step=step, clip_loss=clip_loss, value_range=span, axis_name=context.axis_name,
        )  # fmt: skip
        start = random_start(context.key, flow.index, base.shape[1:], bound=bound, norm=norm) if random_starts else None
        delta, _ = pgd(
            rest, base, None, count, step_size=step_size, num_steps=num_steps, bound=bound, step=step, norm=norm, start=start,
            value_range=span, axis_name=context.axis_name,
        )  # fmt: skip
        state = PersistentDelta(after.astype(state.delta.dtype), jnp.ones([], bool))
        evaluations = num_steps + universal_steps - (not random_starts)  # both searches begin at x + δ*: one pass
        return flow._replace(value=base + delta), state, {"inner_evaluations": jnp.int32(evaluations)}

    return Perturbation(site, init, apply, search=True)
