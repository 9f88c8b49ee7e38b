r"""Sharpness-aware minimisation (SAM): the gradient taken where the loss is highest nearby, to first order.

    ε̂ = ρ · g/‖g‖₂,    g̃ = ∇f(w + ε̂)

Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021; LPG eqs. 1–2. `optax.contrib.sam` takes a new batch for each half
of a step, or an inner loop; this is a plain link that composes, with a radius that may be a schedule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from perturbjax.checks import check_number
from perturbjax.core import method
from perturbjax.parameter.ascent import at_step, move, require, unit_tree


class SAMState(NamedTuple):
    """State of `sam`."""

    count: jax.Array  # [] int32, steps taken, for schedules
    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far


def sam_ascent(grads: optax.Updates, *, radius: jax.typing.ArrayLike) -> optax.Updates:
    """ε̂ = ρ·g/‖g‖, one norm over all parameters, of length ρ; zero for a zero gradient."""
    return jax.tree.map(lambda e: jnp.asarray(radius, e.dtype) * e, unit_tree(grads))


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Foret et al., ICLR 2021", off=dict(radius=0.0),
)  # fmt: skip
def sam(*, radius: optax.ScalarOrSchedule = 0.05) -> optax.GradientTransformationExtraArgs:
    """An optax link with ρ = `radius`, a number or a schedule. Costs one more gradient a step.

    `update` takes `grad_fn=`: parameters -> gradients of the same batch's loss, already averaged over devices.
    """
    if not callable(radius):
        check_number("sam", low=0, radius=radius)

    def init(params):
        return SAMState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, grad_fn=None, **extra_args):
        require("sam", params, grad_fn)
        perturbed = grad_fn(move(params, sam_ascent(updates, radius=at_step(radius, state.count))))
        return perturbed, SAMState(optax.safe_increment(state.count), state.evaluations + 1)

    return optax.GradientTransformationExtraArgs(init, update)
