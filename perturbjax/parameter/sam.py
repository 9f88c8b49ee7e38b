r"""Sharpness-aware minimisation (SAM): the gradient taken where the loss is highest nearby, to first order.

    ε̂ = ρ · g/‖g‖₂,    g̃ = ∇f(w + ε̂)

and for the ball ‖ε‖_p ≤ ρ, with 1/p + 1/q = 1:    ε̂ = ρ · sign(g)|g|^(q−1)/(‖g‖_q^q)^(1/p) = ρ · sign(g)(|g|/‖g‖_q)^(q−1)

p = ∞ is ρ · sign(g). Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021; LPG eqs. 1–2; RTS draft, section 3.2 (the
norms). `optax.contrib.sam` takes a new batch for each half of a step, or an inner loop; this is a plain link that composes, with a
radius that may be a schedule.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import number, wide
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, move, safe, to_climb, unit_tree, widen, with_decay
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting


def sam_ascent(grads: optax.Updates, *, radius: ArrayLike, p: ArrayLike = 2.0, epsilon: ArrayLike = 0.0) -> optax.Updates:
    """ε̂ with ‖ε̂‖_p = ρ = `radius` over all parameters together and ε̂·g = ρ‖g‖_q, the most there is; zero for a zero gradient.

    epsilon is added to ‖g‖_q.
    """
    if isinstance(p, (int, float)) and p == 2:
        direction = unit_tree(grads, epsilon)
    else:
        power = 1 / (number(p) - 1)  # q − 1: 0 for p = ∞
        absolute = [jnp.abs(wide(g)) for g in jax.tree.leaves(grads)]
        top = safe(jnp.stack([x.max() for x in absolute]).max())  # powers of numbers in [0, 1] can't overflow
        to = lambda x: (power + x).astype(top.dtype)
        norm = top * sum(jnp.sum((x / top) ** to(1)) for x in absolute) ** (1 / to(1))
        size = lambda g: ((jnp.abs(wide(g)) / safe(norm, epsilon)) ** to(0)).astype(wide(g).dtype)
        direction = jax.tree.map(lambda g: (jnp.sign(wide(g)) * size(g)).astype(g.dtype), grads)
    return jax.tree.map(lambda e: jnp.asarray(radius, e.dtype) * jnp.conj(e), direction)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Foret et al., ICLR 2021", gradient="replaces", off=dict(radius=0.0),
    resolve_structure=lambda settings: dict(p=settings["p"]),  # the l2 norm has a program of its own
)  # fmt: skip
def sam(
    *,
    radius: Setting = 0.05,
    p: float = 2.0,
    epsilon: ArrayLike = 0.0,
    decay: ArrayLike = 0.0,
    sync_perturbation: bool = True,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient a step.

    `update` takes `grad_fn=`: parameters -> gradients of the same batch's loss, already averaged over devices. BatchNorm's running
    statistics are those of the first pass. Parameters in half precision are given to it in float32: the climb would be rounded away.

    Args:
      radius: ρ, a number or a schedule.
      p: of the norm, > 1; inf climbs by ρ in every coordinate.
      epsilon: added to the gradient's norm; davda54/sam has 1e-12, the official code 0 (and a zero gradient gives nan there).
      decay: of weights, inside the perturbed loss: ascent and gradient are those of f + decay/2·‖w‖², as in the official code. Set the
        optimiser's own decay to 0 then. 0: decay is what the optimiser adds, outside (davda54/sam, ASAM).
      sync_perturbation: False climbs along each device's own gradient (m-sharpness, the official default); needs pmap, or
        `local_grads=` in the update, which is taken as it is, whatever links stand before. On one device there is no difference.
      mask: the parameters it acts on, as in `optax.masked`; the others' gradients pass as they come, and they don't move in the climb.
        None: all.
    """
    check_setting("sam", radius=radius)
    check_number("sam", low=1, open_low=True, infinite=True, p=p)
    check_number("sam", low=0, epsilon=epsilon, decay=decay)

    def init(params):
        return AscentState.start()

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        rho = at(radius, Place.of(state.count, extra_args))
        uphill = widen(with_decay(to_climb("sam", updates, local_grads, sync_perturbation, axis_name), params, decay))
        moved = move(widen(params), sam_ascent(uphill, radius=rho, p=p, epsilon=epsilon))
        perturbed = with_decay(grad_fn(moved), moved, decay)
        return perturbed, state.after_step()

    return asking("sam", init, update, mask=mask)
