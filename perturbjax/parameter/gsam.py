r"""Surrogate-gap guided sharpness-aware minimisation (GSAM): SAM's gradient, less a part of the plain one that is orthogonal to it.

    g_p = ∇f(w + ρ_t g/‖g‖),    g̃ = g_p − α (g − (⟨g, g_p⟩/‖g_p‖²) g_p)

Descending along g̃ lowers the perturbed loss as fast as SAM does, and raises the plain loss across it: the gap between the two
shrinks. In the paper ρ_t follows the learning rate, ρ_t = ρ_min + (ρ_max − ρ_min)(lr_t − lr_min)/(lr_max − lr_min): that is
`radius=by_rate(high=ρ_max, low=ρ_min, floor=lr_min/lr_max)`. The default is a constant. With `adaptive` the climb is ASAM's with η = 0,
as the switch of the first author's code has it: ρ_t w² ⊙ g/‖|w| ⊙ g‖.
Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, dot, move, safe, to_climb, unit_tree, upward, weighted, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting


def gsam_ascent(params: optax.Params, grads: optax.Updates, *, adaptive: bool = False) -> optax.Updates:
    """ε̂/ρ, in at least float32: g/‖g‖, or w² ⊙ g/‖|w| ⊙ g‖ with `adaptive`; one norm over all parameters, zero for a zero gradient."""
    if not adaptive:
        return unit_tree(upward(grads))
    return weighted(params, unit_tree(weighted(params, upward(grads))))


def gsam_direction(perturbed: optax.Updates, grads: optax.Updates, *, alpha: ArrayLike = 0.4) -> optax.Updates:
    """g_p − α g_⊥, with g_⊥ the part of g = `grads` orthogonal to g_p = `perturbed`, over all parameters together."""
    high, plain = widen(perturbed), widen(grads)
    along = dot(plain, high) / safe(dot(high, high))
    rest = jax.tree.map(lambda g, p: g - along.astype(g.dtype) * p, plain, high)
    return jax.tree.map(lambda out, g: out.astype(g.dtype), move(high, rest, -jnp.asarray(alpha)), grads)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Zhuang et al., ICLR 2022", gradient="replaces", off=dict(radius=0.0, alpha=0.0),
)  # fmt: skip
def gsam(
    *, radius: Setting = 0.05, alpha: ArrayLike = 0.4, sync_perturbation: bool = True, adaptive: bool = False, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient a step. `update` takes `grad_fn=` (as `sam`), and `rate=` for `by_rate`.

    Args:
      radius: ρ_t, a number (the default, constant) or a schedule; `by_rate(high=0.05, low=0.01)` is the paper's.
      alpha: α, 0 is SAM.
      sync_perturbation: as in `sam`.
      adaptive: climb by ρ_t w² ⊙ g/‖|w| ⊙ g‖ instead of ρ_t g/‖g‖; False in the paper and, unless asked for, in the code. Such radii are
        larger (ASAM's is 0.5).
      mask: as in `sam`.
    """
    check_setting("gsam", radius=radius)
    check_number("gsam", low=0, alpha=alpha)

    def init(params):
        return AscentState.start()

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        rho = at(radius, Place.of(state.count, extra_args))
        climb = gsam_ascent(params, to_climb("gsam", updates, local_grads, sync_perturbation, axis_name), adaptive=adaptive)
        direction = gsam_direction(grad_fn(move(widen(params), climb, rho)), updates, alpha=alpha)
        return direction, state.after_step()

    return asking("gsam", init, update, mask=mask)
