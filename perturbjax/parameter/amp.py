r"""Adversarial model perturbation (AMP): gradient steps up the loss, kept within a ball, then the gradient there.

    ε⁰ = 0,    εᵏ⁺¹ = Π_ρ(εᵏ + ζ ∇f(w + εᵏ))  for k < T,    g̃ = ∇f(w + ε^T)

Π_ρ projects onto the l2 ball of radius ρ, of all parameters together (the paper's ‖Δw‖ ≤ ε) or of each tensor by itself (the authors'
code: all together then go up to √(number of tensors) times as far). Unlike SAM's, a climb along a small gradient is short.
Source: Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, dot, move, safe, to_climb, upward, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting

NORMS = ("global", "tensor")


def amp_project(delta: optax.Updates, *, radius: ArrayLike, norm: Literal["global", "tensor"] = "global") -> optax.Updates:
    """The nearest point of the l2 ball: of all leaves together, or of each leaf by itself."""

    check_choice("amp_project", "norm", norm, NORMS)

    def shrunk(tree):
        size = jnp.sqrt(dot(tree, tree))
        bound = jnp.asarray(radius, size.dtype)
        factor = jnp.where(size <= bound, 1, bound / safe(size))  # a comparison with nan is false
        return jax.tree.map(lambda e: factor.astype(e.dtype) * e, tree)

    return shrunk(delta) if norm == "global" else jax.tree.map(shrunk, delta)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Zheng et al., CVPR 2021", gradient="replaces", off=dict(radius=0.0),
)  # fmt: skip
def amp(
    *,
    radius: Setting = 0.5,
    step_size: ArrayLike = 1.0,
    num_steps: int = 1,
    norm: Literal["global", "tensor"] = "global",
    sync_perturbation: bool = True,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs `num_steps` more gradients a step. `update` takes `grad_fn=` (as `sam`).

    Args:
      radius: ρ of the ball, a number or a schedule. The authors' code calls it epsilon.
      step_size: ζ.
      num_steps: T; the first step's gradient is there already.
      norm: whose length is bounded by ρ: that of all parameters ("global", the paper), or of each "tensor" (the authors' code).
      sync_perturbation: as in `sam`. False needs num_steps=1: `grad_fn` gives later steps the mean over devices.
      mask: as in `sam`.
    """
    check_setting("amp", radius=radius)
    check_number("amp", low=0, step_size=step_size)
    check_choice("amp", "norm", norm, NORMS)
    if is_traced(num_steps) or num_steps != int(num_steps) or num_steps < 1:
        raise ValueError(
            f"amp needs num_steps to be a whole number >= 1 that is known before tracing, got {num_steps}. Write num_steps=1 (and "
            "optax.inject_hyperparams(pj.amp, static_args=('num_steps',)))."
        )
    steps = int(num_steps)
    if steps > 1 and not sync_perturbation:
        raise ValueError(
            f"amp needs num_steps=1 for sync_perturbation=False, got {steps}: grad_fn averages over devices. Write num_steps=1."
        )

    def init(params):
        return AscentState.start()

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        rho = at(radius, Place.of(state.count, extra_args))
        grads = to_climb("amp", updates, local_grads, sync_perturbation, axis_name)
        delta = jax.tree.map(jnp.zeros_like, widen(updates))
        for _ in range(steps):  # unrolled: convolutions are slow in loops on CPU, and T is small
            delta = amp_project(move(delta, upward(grads), step_size), radius=rho, norm=norm)
            grads = grad_fn(move(widen(params), delta))
        return grads, state.after_step(steps)

    return asking("amp", init, update, mask=mask)
