r"""What adversarial training by sample, class and corpus shares: the ball and its units, random starts, deltas that outlive a batch.

    δ_g ← Π_{‖δ‖ ≤ ε}( δ_g + α · sign Σ_{i ∈ g} ∇_x min(ℓ(x_i + δ_g), β) )          a group absent from the batch keeps its delta

With every sample its own group and δ = 0 at every batch this is AT; with a δ that persists, classes make it C-UAT, one group UAT, places
in the batch free AT.
Source: taxonomy eqs. 31, 45–47.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.classes import AxisName, class_count, wide
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.projection import NORMS, Norm, per_group, project

Step = Literal["sign", "unit", "raw"]
Range = tuple[float, float] | None


def random_start(key: jax.Array, index: jax.Array, shape: tuple[int, ...], *, bound: ArrayLike, norm: Norm) -> jax.Array:
    """A random delta for each sample, [B, *shape]: uniform in the cube of half-width `bound`, projected onto the ball."""
    draw = lambda k: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0)
    cube = bound * jax.vmap(draw)(per_sample_keys(key, index))
    return project(cube, jnp.broadcast_to(jnp.asarray(bound, cube.dtype), index.shape), norm)


def shifted(value: jax.Array, delta: jax.Array, groups: jax.Array, *, value_range: Range = None) -> jax.Array:
    """value [B, ...] + δ of each sample's group [G, ...], clipped to the range; samples of no group stay where they are.

    >>> print(shifted(jnp.array([[0.5], [0.9]]), jnp.array([[0.25]]), jnp.array([0, 0]), value_range=(0.0, 1.0)))
    [[0.75]
     [1.  ]]
    """
    own = delta.astype(wide(value).dtype).at[groups].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    if value_range is not None:
        own = jnp.clip(wide(value) + own, *value_range) - wide(value)
    return value + own.astype(value.dtype)  # of a zero delta, the value bit for bit


def group_ascent(
    loss_of: Callable[[jax.Array], jax.Array],
    value: jax.Array,
    delta: jax.Array,
    groups: jax.Array,
    *,
    bound: ArrayLike,
    step_size: ArrayLike,
    num_steps: int = 1,
    norm: Norm = "linf",
    step: Step = "sign",
    clip_loss: ArrayLike = jnp.inf,
    value_range: Range = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """The groups' deltas [G, ...] after `num_steps` steps on one batch; of groups without a sample in it, as they were.

    Args:
      loss_of: value [B, ...] -> losses [B].
      value: [B, ...], clean.
      delta: [G, ...], from the batch before.
      groups: [B] integers in 0..G-1; others (padding) have no delta.
      bound, step_size: ε, α in units of the value; may be traced.
      num_steps, norm, step: of `pgd`.
      clip_loss: β, the loss from which on a sample no longer pulls: the delta does not live for a few lost samples. (With BatchNorm,
        their losses still reach the others through the batch's statistics.)
      value_range: what value + delta is clipped to before the loss is taken.
      axis_name: mapped axis to average gradients over.

    >>> away = lambda v: -((v - 1) ** 2).sum(1)  # the loss grows towards 1
    >>> step = dict(bound=0.5, step_size=0.25)
    >>> print(group_ascent(away, jnp.zeros([2, 1]), jnp.zeros([2, 1]), jnp.array([1, 1]), **step))
    [[0.  ]
     [0.25]]
    """
    number, count = delta.shape[0], value.shape[0]
    _, search = pgd(
        as_trained(loss_of, count), value, groups, number, start=delta.astype(wide(value).dtype), step_size=step_size,
        num_steps=num_steps, bound=bound, step=step, norm=norm, value_range=value_range, axis_name=axis_name,
        transform=lambda mean: mean * count, pulls=lambda losses: losses * count < jnp.asarray(clip_loss, losses.dtype),
    )  # fmt: skip
    here = class_count(groups, number, axis_name=axis_name, dtype=search.delta.dtype) > 0
    return jnp.where(per_group(here, delta), search.delta, delta.astype(search.delta.dtype))


def as_trained(loss_of: Callable[[jax.Array], jax.Array], count: int) -> Callable[[jax.Array], jax.Array]:
    """losses / B: the cotangents of the training pass, so that a compiler that meets both at one point keeps one backward pass."""
    return lambda value: (losses := loss_of(value)) * jnp.asarray(1 / count, losses.dtype)


class PersistentDelta(NamedTuple):
    """Deltas that outlive the batch."""

    delta: jax.Array  # [G, ...], one per group
    started: jax.Array  # [] bool, whether the random start has been drawn


def persistent_init(number: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> PersistentDelta:
    """Before the first batch: zero deltas."""
    return PersistentDelta(jnp.zeros([number, *shape], dtype), jnp.zeros([], bool))


def persistent_start(state: PersistentDelta, key: jax.Array, *, random_starts: bool, bound: ArrayLike, norm: Norm) -> jax.Array:
    """The deltas [G, ...] for this batch: those of the state, or before the first batch a random point of the ball for each group."""
    if not random_starts:
        return state.delta
    index = jnp.arange(state.delta.shape[0], dtype=jnp.int32)
    drawn = random_start(key, index, state.delta.shape[1:], bound=bound, norm=norm)
    return jnp.where(state.started, state.delta, drawn.astype(state.delta.dtype))


def persistent_link(
    function: str,
    site: str,
    groups_of: Callable[[Flow, Context, int], jax.Array],
    number_of: Callable[[Context], int],
    *,
    bound: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    norm: Norm,
    step: Step,
    clip_loss: ArrayLike,
    update: Literal["after", "before"],
    value_range: Range,
    random_starts: bool,
) -> Perturbation:
    """Training at x + δ_g with a δ for each group that persists over batches: UAT, C-UAT and free AT, which differ in who is a group.

    Args:
      function: the method's name, for messages.
      site, bound, step_size, num_steps, norm, step, clip_loss, update, value_range, random_starts: the method's settings.
      groups_of: (flow, context, G) -> [B] integers.
      number_of: context at init -> G.
    """
    check_ball(function, norm=norm, step=step, site=site, value_range=value_range, bound=bound, step_size=step_size)
    check_number(function, low=1, num_steps=num_steps)
    check_number(function, low=0, open_low=True, infinite=True, clip_loss=clip_loss)
    check_choice(function, "update", update, ("after", "before"))

    def init(context: Context) -> PersistentDelta:
        shape = site_shape(function, context, norm=norm, value_range=value_range, bound=bound)
        return persistent_init(number_of(context), shape, context.dtype)

    def apply(flow: Flow, rest: Rest, state: PersistentDelta, context: Context):
        require_floats(function, flow.value, site)
        require_shape(function, flow.value, state.delta, site)
        groups, span = groups_of(flow, context, state.delta.shape[0]), pixel_range(value_range, context)
        now = persistent_start(state, context.key, random_starts=random_starts, bound=bound, norm=norm)
        after = group_ascent(
            rest, flow.value, now, groups, bound=bound, step_size=step_size, num_steps=num_steps, norm=norm, step=step,
            clip_loss=clip_loss, value_range=span, axis_name=context.axis_name,
        ).astype(state.delta.dtype)  # fmt: skip
        value = shifted(flow.value, now if update == "after" else after, groups, value_range=span)
        return (
            flow._replace(value=value),
            PersistentDelta(after, jnp.ones([], bool)),
            # Before the update the search's first point is the training's own, and one pass serves both.
            {"inner_evaluations": jnp.int32(num_steps - (update == "after"))},
        )

    return Perturbation(site, init, apply, search=True)


# Checks ---------------------------------------------------------------------------------------------------------------


def pixel_range(value_range: Range, context: Context) -> Range:
    """The range at the input; None at other sites, the embedding of texts among them."""
    return value_range if context.site == "input" else None


def check_ball(
    function: str,
    *,
    norm: str,
    step: str = "sign",
    site: str = "input",
    value_range: Range = (0.0, 1.0),
    other: str = ", or value_range=None for inputs that are no pixels",
    **sizes: ArrayLike | None,
) -> None:
    """Raises ValueError for an unknown norm or step, and for bounds and step sizes that can't be in the units of the pixels.

    other: what else there is to write, for the message.
    """
    check_choice(function, "norm", norm, NORMS)
    check_choice(function, "step", step, ("sign", "unit", "raw"))
    check_number(function, low=0, **sizes)
    if site != "input" or value_range is None or is_traced(value_range):
        return
    low, high = value_range
    if not low < high:
        raise ValueError(
            f"{function} needs value_range (low, high) with low < high, got {value_range}. Write value_range=(0.0, 1.0)."
        )
    for name, size in sizes.items():
        raw = step == "raw" and name.endswith("step_size")  # a factor of the gradient
        if size is not None and not raw and not is_traced(size):
            _check_size(
                function, name, float(np.max(np.asarray(size))), high - low if norm == "linf" else np.inf, value_range, other
            )


def site_shape(function: str, context: Context, *, norm: str, value_range: Range, **sizes: ArrayLike) -> tuple[int, ...]:
    """Shape of one sample at the link's site; at the input, bounds longer than any way between two images are errors, and images that
    are not in the range."""
    assert context.site_shapes is not None and context.site is not None
    check_inputs(function, context, value_range)
    shape = tuple(context.site_shapes[context.site][1:])
    if context.site == "input" and value_range is not None and not is_traced((value_range, sizes)):
        entries = float(np.prod(shape))
        width = (value_range[1] - value_range[0]) * {"linf": 1.0, "l2": np.sqrt(entries), "l1": entries}[norm]
        for name, size in sizes.items():
            _check_size(function, name, float(np.max(np.asarray(size))), width, value_range)
    return shape


def check_inputs(function: str, context: Context, value_range: Range) -> None:
    """Raises ValueError, at init, for pixels in other units than those of the range that perturbed ones are clipped to. What can't be
    judged there passes: shapes without numbers, and whole numbers."""
    inputs, span = context.inputs, pixel_range(value_range, context)
    if inputs is None or span is None or is_traced(span) or not jnp.issubdtype(inputs.dtype, jnp.floating) or not inputs.size:
        return
    (low, high), numbers = span, np.asarray(inputs, np.float64)
    least, most = numbers.min(), numbers.max()
    slack = 1e-3 * (high - low)  # resizing leaves a little
    if least < low - slack or most > high + slack:
        raise ValueError(
            f"{function} needs inputs in value_range, [{low:g}, {high:g}], got {least:g} to {most:g}: they would be clipped. "
            "Write images / 255 for grey levels, value_range=None for inputs that are no pixels."
        )
    if high - low >= 100 and 0 < most <= 1:
        raise ValueError(
            f"{function} needs inputs in the units of value_range, [{low:g}, {high:g}], got none above {most:g}. "
            f"Write value_range=(0.0, 1.0), with bounds and step sizes divided by {high - low:g}."
        )


def require_floats(function: str, value: jax.Array, site: str) -> None:
    """Raises ValueError for whole numbers (words, uint8 images), which can't be moved a little."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{function} needs floating values at the site {site!r}, got {value.dtype}. Write images / 255 for pixels; for words, "
            "cut the model at their embedding with pj.line and name that site."
        )


def require_shape(function: str, value: jax.Array, delta: jax.Array, site: str) -> None:
    """Raises ValueError for values [B, ...] of another size than the deltas [G, ...], which are made for that of the first batch."""
    if value.shape[1:] != delta.shape[1:]:
        raise ValueError(
            f"{function} needs values of one size at the site {site!r}, {delta.shape[1:]} as at init, got {value.shape[1:]}: its delta "
            "outlives the batch. Resize them, or write states = objective.init(variables, inputs) for these, which starts a new delta."
        )


def _check_size(function: str, name: str, size: float, width: float, value_range: tuple[float, float], other: str = "") -> None:
    low, high = value_range
    if size > width * (1 + 1e-6):
        raise ValueError(
            f"{function} needs {name} <= {width:g}, got {size:g}: the inputs are in [{low:g}, {high:g}]. "
            f"Write {name}={size:g}/255 if you count in grey levels{other}."
        )
    if high - low >= 100 and 0 < size < 0.1:
        raise ValueError(
            f"{function} needs {name} in the units of value_range, [{low:g}, {high:g}], got {size:g}. "
            f"Write {name}={size * (high - low):.6g}."
        )


def group_number(function: str, groups: str, number: int | None, given: Any) -> int:
    """G, from a setting or from the context; ValueError if nobody says."""
    found = number if number is not None else given
    if found is None:
        how = (
            "objective(..., num_domains=D)" if groups == "domain" else f"num_groups=G, the number of values of side[{groups!r}]"
        )
        raise ValueError(f"{function} needs the number of groups for groups={groups!r}, got none. Pass {how}.")
    return int(found)
