r"""LookSAM: SAM's gradient at every k-th step; its part across the plain gradient is used again at the others.

    step t = 0, k, 2k ...:    g̃ = g_s = ∇f(w + ρ ĝ),    g_v = g_s − ⟨g_s, ĝ⟩ ĝ,    ĝ = g/‖g‖
    other steps:              g̃ = g + α (‖g‖/‖g_v‖) g_v

g_v changes slowly over training, much slower than g_s: that is what the method rests on. Source: Liu et al., "Towards Efficient and
Scalable Sharpness-Aware Minimization", CVPR 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method
from perturbjax.parameter.ascent import dot, move, safe, to_climb, unit_tree, upward, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting


class LookSAMState(NamedTuple):
    """State of `looksam`."""

    count: jax.Array  # [] int32, steps taken, where the update gets no `step`
    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far
    across: optax.Updates  # g_v, like the parameters, in at least float32; zero before the first SAM step


def looksam_across(perturbed: optax.Updates, grads: optax.Updates) -> optax.Updates:
    """g_v = g_s − ⟨g_s, ĝ⟩ ĝ of g_s = `perturbed`: its part orthogonal to g = `grads`, over all parameters, in at least float32."""
    high, unit = widen(perturbed), unit_tree(widen(grads))
    return move(high, unit, -dot(high, unit))


def looksam_reuse(grads: optax.Updates, across: optax.Updates, *, alpha: ArrayLike = 0.7) -> optax.Updates:
    """g + α (‖g‖/‖g_v‖) g_v, in the gradients' types; g where g_v is zero."""
    length = jnp.sqrt(dot(grads, grads) / safe(dot(across, across)))
    return move(grads, across, jnp.asarray(alpha, length.dtype) * length)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Liu et al., CVPR 2022", gradient="replaces", off=dict(radius=0.0, alpha=0.0),
)  # fmt: skip
def looksam(
    *, radius: Setting = 0.05, every: int = 5, alpha: ArrayLike = 0.7, sync_perturbation: bool = True, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient at every k-th step, nothing at the others. `update` takes `grad_fn=` (as `sam`).

    Args:
      radius: ρ, a number or a schedule.
      every: k; 1 is SAM. The steps are counted by `step=`, if the update gets one.
      alpha: α, how much of g_v is added between.
      sync_perturbation: as in `sam`; ĝ in g_v is the whole batch's.
      mask: as in `sam`.
    """
    check_setting("looksam", radius=radius)
    check_number("looksam", low=1, every=every)
    check_number("looksam", low=0, alpha=alpha)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, widen(params))
        return LookSAMState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), zeros)

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        place = Place.of(state.count, extra_args)

        def looked():
            climb = unit_tree(upward(to_climb("looksam", updates, local_grads, sync_perturbation, axis_name)))
            perturbed = grad_fn(move(widen(params), climb, at(radius, place)))
            kept = looksam_across(perturbed, updates)
            perturbed = jax.tree.map(lambda p, g: p.astype(g.dtype), perturbed, updates)
            return perturbed, jax.tree.map(lambda v, old: v.astype(old.dtype), kept, state.across)

        def reused():
            return looksam_reuse(updates, state.across, alpha=alpha), state.across

        now = jnp.asarray(place.step % every == 0)
        out, across = jax.lax.cond(now, looked, reused)
        return out, LookSAMState(optax.safe_increment(state.count), state.evaluations + now.astype(jnp.int32), across)

    return asking("looksam", init, update, mask=mask)
