r"""Efficient sharpness-aware minimisation (ESAM): climbs with some of the weights, learns from the samples that the climb hurts.

    ε̂ = (ρ/β) · m ⊙ g/‖g‖,  m ~ Bernoulli(β) per coordinate,    S = the γB samples of largest ℓ_i(w + ε̂) − ℓ_i(w)
    g̃ = ∇ mean_{i ∈ S} ℓ_i(w + ε̂)

1/β keeps the climb's expectation. Here S is chosen by sample weights, which leave the shapes as they are: the second gradient costs a
whole one, and the losses at w + ε̂ a forward pass more. So a step costs 2⅓ gradients, not the paper's fewer than SAM's two; `looksam`
and `rts(timing=every(2))` are the ways to save. Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of
Neural Networks", ICLR 2022.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, gather, own_share, wide
from perturbjax.method import method
from perturbjax.parameter.ascent import AscentState, move, to_climb, unit_tree, upward, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, at, check_setting
from perturbjax.rounding import rounded


def esam_ascent(grads: optax.Updates, key: jax.Array, *, radius: ArrayLike, beta: ArrayLike = 0.5) -> optax.Updates:
    """ε̂ = (ρ/β) m ⊙ g/‖g‖ with a new mask per leaf, in at least float32; with β = 1 it is SAM's."""
    leaves, structure = jax.tree.flatten(unit_tree(upward(grads)))
    drop = lambda i, e: jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), beta, e.shape), e, 0)
    scale = lambda e: jnp.asarray(radius, e.dtype) / jnp.asarray(beta, e.dtype) * e
    return jax.tree.unflatten(structure, [scale(drop(i, e)) for i, e in enumerate(leaves)])


def esam_weights(rise: jax.Array, *, gamma: ArrayLike = 0.5, axis_name: AxisName = None) -> jax.Array:
    """B/n for the n = max(1, round(γB)) samples whose loss rose most, 0 for the others: [B], of the losses' rises [B].

    With `axis_name`, the most over all devices. Of equal rises the first ones are taken.

    >>> print(esam_weights(jnp.array([0.1, 0.4, 0.3, -1.0])))
    [0. 2. 2. 0.]
    """
    rise = wide(rise)
    everyone = gather(rise, axis_name)
    total = everyone.shape[0]
    place = jnp.argsort(jnp.argsort(-everyone, stable=True), stable=True)  # 0 for the largest; nan is last
    count = jnp.maximum(rounded(jnp.asarray(gamma, rise.dtype) * total), 1)
    place = own_share(place, axis_name)
    return jnp.where(place.astype(count.dtype) < count, total / count, 0)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="Du et al., ICLR 2022", gradient="replaces", off=dict(radius=0.0, gamma=1.0),
)  # fmt: skip
def esam(
    *, radius: Setting = 0.05, beta: ArrayLike = 0.5, gamma: ArrayLike = 0.5, sync_perturbation: bool = True, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs one more gradient and a forward pass a step.

    `update` takes `grad_fn=` (as `sam`, with `weights=` [B]), `key=`, and `loss_fn=`: parameters -> losses [B] of the same batch.

    Args:
      radius: ρ, a number or a schedule.
      beta: share of the coordinates that climb; 1 is SAM's climb.
      gamma: share of the samples that count in the second gradient; 1: all.
      sync_perturbation: as in `sam`. The coordinates are the same on all devices, the samples are chosen among those of all.
      mask: as in `sam`.
    """
    check_setting("esam", radius=radius)
    check_number("esam", low=0, high=1, open_low=True, beta=beta, gamma=gamma)

    def init(params):
        return AscentState.start()

    def update(
        updates, state, params, *, grad_fn, local_grads=None, key=None, loss_fn=None, losses=None, axis_name=None, **extra_args
    ):
        if key is None or loss_fn is None:
            missing = "key" if key is None else "loss_fn"
            raise ValueError(
                f"esam needs `{missing}`, got none: call tx.update(grads, state, params, grad_fn=..., key=jax.random.key(step), "
                "loss_fn=lambda p: losses(p, batch)), with losses [B] and grad_fn(p, weights=None)."
            )
        rho = at(radius, Place.of(state.count, extra_args))
        uphill = to_climb("esam", updates, local_grads, sync_perturbation, axis_name)
        moved = move(widen(params), esam_ascent(uphill, key, radius=rho, beta=beta))
        before = wide(loss_fn(widen(params)) if losses is None else losses)
        weights = jax.lax.stop_gradient(esam_weights(wide(loss_fn(moved)) - before, gamma=gamma, axis_name=axis_name))
        return grad_fn(moved, weights=weights), state.after_step()

    return asking("esam", init, update, mask=mask)
