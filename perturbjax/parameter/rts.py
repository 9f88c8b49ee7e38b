r"""Radius-timing scale (RTS): PUGD with three schedules of the step t, for how far, when and how much to perturb.

    ε̂ = ρ_t · |w| ⊙ g/‖|w| ⊙ g‖,    g* = ∇f(w + ε̂),    U = (g* + s_t g)/‖g* + s_t g‖        at active steps
    g, or g/‖g‖                                                                              at the others

U has length 1 and g has its own, so with plain inactive steps the size of the updates jumps where the timing switches, and learning rate
and weight decay mean something else from then on: a note in the log says so. `inactive="unit"` keeps one size; compare timings with it.

ρ ≡ s ≡ 1, always active, is PUGD. s = 0 is the unit gradient at w + ε̂: not normalised SAM, which climbs along g instead of
|w| ⊙ g (`ascent="gradient"`). Source: RTS draft, eqs. 1–3 and sections 3.1–3.2 (radius, timing, scale as ideas); Tseng et al., IJCNN
2022 (PUGD). The draft leaves its sections 3.3 and 3.4 empty: scale and timing are our definition, and no number of its is known.
"""

import functools
import logging
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from perturbjax.checks import check_choice
from perturbjax.method import method
from perturbjax.parameter.ascent import move, to_climb, unit_tree, weighted, widen
from perturbjax.parameter.asking import Mask, asking
from perturbjax.parameter.timing import Place, Setting, Timing, always, at, check_setting, never

ASCENTS = ("weighted", "gradient")


class RTSState(NamedTuple):
    """State of `rts`."""

    count: jax.Array  # [] int32, steps taken, for schedules where the update gets no `step`
    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far
    timing: tuple  # what the timing remembers


def rts_ascent(
    params: optax.Params, grads: optax.Updates, *, ascent: Literal["weighted", "gradient"] = "weighted"
) -> optax.Updates:
    """The direction to climb, of length 1 over all parameters: |w| ⊙ g ("weighted") or g ("gradient"), normalised."""
    check_choice("rts_ascent", "ascent", ascent, ASCENTS)
    return optax.tree.conj(unit_tree(grads if ascent == "gradient" else weighted(params, grads)))


def rts_direction(above: optax.Updates, grads: optax.Updates, *, scale: jax.typing.ArrayLike) -> optax.Updates:
    """U = (g* + s·g)/‖g* + s·g‖ of g* = `above`, g = `grads`, in the types of the latter."""
    unit = unit_tree(move(widen(above), grads, scale))
    return jax.tree.map(lambda u, g: u.astype(g.dtype), unit, grads)


@method(
    target="parameter", direction=(+1,), inference="adversarial", granularity="corpus",
    cite="RTS draft", gradient="replaces", off=dict(timing=never()),
)  # fmt: skip
def rts(
    *,
    radius: Setting = 1.0,
    timing: Timing = always(),
    scale: Setting = 1.0,
    ascent: Literal["weighted", "gradient"] = "weighted",
    inactive: Literal["plain", "unit"] = "plain",
    sync_perturbation: bool = True,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax link. An active step costs one more gradient, an inactive one costs none (`lax.cond`, which is fast on CPU with the
    models' own convolution, conv="canonical").

    `update` takes `grad_fn=` (as `sam`), and what the schedules ask for: `step=`, `progress=`, `value=`, `rate=`.

    Args:
      radius: ρ_t, a number, an optax schedule of the step, `cosine(...)`, `linear(...)` or `by_rate(...)`. 0 gives the unit gradient.
      timing: when it is active: always(), never(), after(share), last(share), every(k), plateau(...).
      scale: s_t, as radius.
      ascent: what to climb along, PUGD's "weighted" |w| ⊙ g or SAM's "gradient".
      inactive: the other steps' update: the "plain" gradient, whose length is not that of the active steps (the updates jump at a switch,
        and a note in the log says so), or the "unit" one, whose length is.
      sync_perturbation: as in `sam`: False climbs along each device's own gradient.
      mask: as in `sam`.

    Raises ValueError for a negative radius or scale where the host can see it. A schedule that turns negative within jit gives nan.
    """
    check_setting("rts", radius=radius, scale=scale)
    check_choice("rts", "ascent", ascent, ASCENTS)
    check_choice("rts", "inactive", inactive, ("plain", "unit"))
    if not isinstance(timing, Timing):
        raise ValueError(f"rts needs timing to be one of the timings, got {timing!r}. Write timing=pj.last(0.5).")

    def init(params):
        if inactive == "plain" and timing.switches:
            _note()
        return RTSState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), timing.init())

    def update(updates, state, params, *, grad_fn, local_grads=None, axis_name=None, **extra_args):
        place = Place.of(state.count, extra_args)
        active, memory = timing.active(state.timing, place)

        def perturbed():
            uphill = widen(to_climb("rts", updates, local_grads, sync_perturbation, axis_name))
            above = grad_fn(move(widen(params), rts_ascent(params, uphill, ascent=ascent), at(radius, place)))
            return rts_direction(above, updates, scale=at(scale, place))

        def otherwise():
            return updates if inactive == "plain" else unit_tree(updates)

        if isinstance(active, bool):  # no branch in the program
            out = perturbed() if active else otherwise()
        else:
            out = jax.lax.cond(active, perturbed, otherwise)
        asked = state.evaluations + jnp.asarray(active, jnp.int32)
        return out, RTSState(optax.safe_increment(state.count), asked, memory)

    return asking("rts", init, update, mask=mask)


@functools.cache  # once
def _note() -> None:
    logging.getLogger(__name__).warning(
        "rts: active steps have length 1 and the others that of the plain gradient: the updates jump where its timing switches, "
        "and learning rate and weight decay mean something else from then on. Write inactive=unit for one length."
    )
