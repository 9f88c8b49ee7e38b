r"""RegPert: a delta for each sample that pays for its size instead of being bounded: the Lagrangian form of adversarial training.

    δ = argmax_δ ℓ(x + δ) − λ‖δ‖_p^p        direction +1;      δ = argmin_δ ℓ(x + δ) + λ‖δ‖_p^p        direction −1

by K proximal steps δ ← prox_{κλ‖·‖_p^p}( δ ± κ ∇_x ℓ(x + δ) ) from zero: p = 2 moves every pixel by its slope over 2λ to first order,
p = 1 only those whose slope is above λ. Our reading of an attack on detectors for the training of classifiers.
Source: Wang et al., IEEE Transactions on Cybernetics 2021 (the attack); taxonomy, eq. 27, taken to the input.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import wide
from perturbjax.feature.adversarial import Range, check_inputs, pixel_range, require_floats
from perturbjax.inference.pgd import UNROLLED
from perturbjax.inference.proximal import REGULARISERS, Regulariser, proximal_step
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def regularised_delta(
    loss_of: Callable[[jax.Array], jax.Array],
    value: jax.Array,
    *,
    weight: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    direction: ArrayLike = 1.0,
    norm: Regulariser = "l2",
    value_range: Range = None,
) -> jax.Array:
    """The deltas [B, ...] after `num_steps` proximal steps, constants for every gradient.

    Args:
      loss_of: value [B, ...] -> losses [B].
      value: [B, ...], clean.
      weight: λ. step_size: κ, at most 1 / (largest curvature of the loss) to converge.
      num_steps: K.
      direction: +1 raises the losses, −1 lowers them.
      norm: "l1" or "l2" (squared).
      value_range: what value + delta is clipped to after every step.
    """
    check_choice("regularised_delta", "norm", norm, REGULARISERS)
    x = wide(jax.lax.stop_gradient(value))
    slope = jax.grad(lambda point: loss_of(point.astype(value.dtype)).sum())

    def one(delta: jax.Array) -> jax.Array:
        down = -jnp.asarray(direction, x.dtype) * slope(jax.lax.stop_gradient(x + delta))
        delta = proximal_step(delta, down, weight=weight, step_size=step_size, norm=norm)
        delta = delta if value_range is None else jnp.clip(x + delta, *value_range) - x
        return jax.lax.stop_gradient(delta)

    delta = jnp.zeros_like(x)
    if num_steps <= UNROLLED:
        for _ in range(num_steps):
            delta = one(delta)
    else:
        delta, _ = jax.lax.scan(lambda delta, _: (one(delta), None), delta, None, length=num_steps)
    return delta.astype(value.dtype)


@method(
    target="feature", direction=(+1, -1), inference="regularised", granularity="sample",
    cite="Wang et al., IEEE TCYB 2021", off=dict(step_size=0.0),
)  # fmt: skip
def regpert(
    *,
    weight: ArrayLike = 5.0,
    step_size: ArrayLike = 0.1,
    num_steps: int = 3,
    direction: ArrayLike = 1.0,
    norm: Regulariser = "l2",
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Perturbation:
    """Trains on inputs moved as far as λ lets them.

    Args:
      weight: λ: the larger, the smaller the deltas. step_size: κ.
      num_steps: K.
      direction: +1 raises the losses (adversarial training), −1 lowers them.
      norm: "l2" (squared) or "l1", which leaves most pixels alone; an entry that moves, moves on until the loss gives way.
      site: "input" or any other site.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites: no clipping.

    Metrics: inner_evaluations.
    """
    check_number("regpert", low=0, weight=weight, step_size=step_size)
    check_number("regpert", low=-1, high=1, direction=direction)
    check_number("regpert", low=1, num_steps=num_steps)
    check_choice("regpert", "norm", norm, REGULARISERS)

    def init(context: Context) -> tuple:
        check_inputs("regpert", context, value_range)
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        require_floats("regpert", flow.value, site)
        delta = regularised_delta(
            rest, flow.value, weight=weight, step_size=step_size, num_steps=num_steps, direction=direction, norm=norm,
            value_range=pixel_range(value_range, context),
        )  # fmt: skip
        return flow._replace(value=flow.value + delta), state, {"inner_evaluations": jnp.int32(num_steps)}

    return Perturbation(site, init, apply, search=True)
