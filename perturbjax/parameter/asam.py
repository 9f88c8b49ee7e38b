r"""Adaptive sharpness-aware minimisation (ASAM): the climb measured in units of each weight's own size.

    ε̂ = ρ · T²g/‖Tg‖₂,    T = |w| + η,    g̃ = ∇f(w + ε̂)

ε̂ is the steepest climb with ‖ε/T‖₂ = ρ, so rescaling a layer and its inverse elsewhere changes nothing. Source: Kwon et al., "ASAM:
Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning", ICML 2021.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import wide
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, dot, move, safe, to_climb, widen, with_decay
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting

ADAPTIVE = ("all", "weights")


def asam_scale(params: optax.Params, *, eta: ArrayLike = 0.01, adaptive: Literal["all", "weights"] = "all") -> optax.Params:
    """T = |w| + η in at least float32; 1 for the biases (leaves whose own name contains "bias") with "weights"."""

    check_choice("asam_scale", "adaptive", adaptive, ADAPTIVE)

    def scale(path, w):
        size = jnp.abs(wide(w))
        size = size + jnp.asarray(eta, size.dtype)
        names = [key for key in path if key != jax.tree_util.GetAttrKey("value")]  # of a variable of flax.nnx
        named = jax.tree_util.keystr(tuple(names[-1:])).lower()
        return jnp.ones_like(size) if adaptive == "weights" and "bias" in named else size

    return jax.tree_util.tree_map_with_path(scale, params)


def asam_ascent(
    params: optax.Params,
    grads: optax.Updates,
    *,
    radius: ArrayLike,
    eta: ArrayLike = 0.01,
    adaptive: Literal["all", "weights"] = "all",
    epsilon: ArrayLike = 0.0,
) -> optax.Updates:
    """ε̂ = ρ T²g/(‖Tg‖ + epsilon), one norm over all parameters; zero for a zero gradient."""
    scale = asam_scale(params, eta=eta, adaptive=adaptive)
    to = lambda g, t: g.dtype if jnp.iscomplexobj(g) else t.dtype
    scaled = jax.tree.map(lambda t, g: t.astype(to(g, t)) * g.astype(to(g, t)), scale, grads)
    norm = safe(jnp.sqrt(dot(scaled, scaled)), epsilon)
    unit = lambda t, s: t.astype(s.dtype) * (jnp.conj(s) / norm.astype(s.dtype))
    step = lambda t, s, g: (jnp.asarray(radius, s.dtype) * unit(t, s)).astype(g.dtype)
    return jax.tree.map(step, scale, scaled, grads)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Kwon et al., ICML 2021", gradient="replaces", off=dict(radius=0.0),
)  # fmt: skip
def asam(
    *,
    radius: Setting = 0.5,
    eta: ArrayLike = 0.01,
    adaptive: Literal["all", "weights"] = "all",
    epsilon: ArrayLike = 0.0,
    decay: ArrayLike = 0.0,
    sync_perturbation: bool = True,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient a step. `update` takes `grad_fn=` (as `sam`).

    Args:
      radius: ρ, a number or a schedule; the authors take 0.5 for CIFAR-10 and 1.0 for CIFAR-100.
      eta: η, added to |w|; 0.01 in the paper, 0 in the authors' script.
      adaptive: "all" parameters, or "weights": T = 1 for biases (the authors' code).
      epsilon: added to the norm; the authors' code has 1e-16. (davda54's adaptive SAM: radius=2.0, eta=0, epsilon=1e-12.)
      decay: of weights, inside the perturbed loss, as in `sam`; 0 in the authors' code, where it is the optimiser's.
      sync_perturbation, mask: as in `sam`.
    """
    check_setting("asam", radius=radius)
    check_number("asam", low=0, eta=eta, epsilon=epsilon, decay=decay)
    check_choice("asam", "adaptive", adaptive, ADAPTIVE)

    def init(params):
        return AscentState.start()

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        rho = at(radius, Place.of(state.count, extra_args))
        uphill = widen(with_decay(to_climb("asam", updates, local_grads, sync_perturbation, axis_name), params, decay))
        moved = move(widen(params), asam_ascent(params, uphill, radius=rho, eta=eta, adaptive=adaptive, epsilon=epsilon))
        perturbed = with_decay(grad_fn(moved), moved, decay)
        return perturbed, state.after_step()

    return asking("asam", init, update, mask=mask)
