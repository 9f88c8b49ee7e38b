r"""Projected gradient steps on a delta per group of samples, at any site of the network.

    δ_g ← Π_{‖δ‖ ≤ ε_g}( δ_g + s_g · κ_g · step( mean_{i ∈ g} ∂ℓ_i(v_i + δ_g)/∂v_i ) )      for K_g steps, from δ_g = 0

s_g = +1 raises the loss of group g, −1 lowers it. Groups are samples (AT), classes (LPL, LPA, C-UAT), the corpus (UAT) or
anything else. Source: Madry et al., ICLR 2018; class-wise: LPL Algorithm 2, LPA eqs. 9–11; taxonomy eqs. 31–32, 45–46.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, is_traced
from perturbjax.classes import AxisName, at_least_float32, class_mean, wide
from perturbjax.projection import NORMS, Norm, per_group, project, unit

UNROLLED = 10
"""Loops of up to this many steps are unrolled: the gradient of a convolution inside a loop is slow on CPUs."""

Setting = ArrayLike | Callable[[jax.Array, Any], ArrayLike]


class Search(NamedTuple):
    """What the search saw. Step 0 is the clean pass (unless it starts from a delta): its statistics cost nothing extra."""

    losses: jax.Array  # [B], of step 0
    aux: Any  # of step 0: what `loss_of` returned beside the losses (None without has_aux)
    delta: jax.Array  # [G, ...], the groups' deltas at the end, to start from next time (UAT)
    last: Any = None  # (delta [B, ...], aux) of the last evaluation, that of the last step (None without has_aux)


def pgd(
    loss_of: Callable[[jax.Array], Any],
    value: jax.Array,
    groups: jax.Array | None,
    num_groups: int,
    *,
    direction: Setting = 1.0,
    step_size: Setting,
    num_steps: Setting = 3,
    bound: Setting = jnp.inf,
    step: Literal["raw", "unit", "sign"] = "unit",
    norm: Norm = "l2",
    max_steps: int | None = None,
    start: jax.Array | None = None,
    value_range: tuple[float, float] | None = None,
    transform: Callable[[jax.Array], jax.Array] | None = None,
    pulls: Callable[[jax.Array], jax.Array] | None = None,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> tuple[jax.Array, Search]:
    """Finds one delta per group by projected gradient steps.

    No gradient flows from the delta into `value` or into what `loss_of` closes over; derivatives with respect to direction,
    step_size and bound stay alive, for learning them.

    Args:
      loss_of: value [B, ...] -> losses [B], or (losses, aux) with `has_aux`. Each loss may depend on its own sample's value
        only, or (BatchNorm) on the others'.
      value: [B, ...], the clean value at the site.
      groups: [B] integers in 0..G-1, which samples share a delta (others, such as padding, have none); None: every sample has its
        own (then num_groups = B).
      num_groups: G.
      direction: s, +1 raises the loss, −1 lowers it, 0 leaves it alone; a number or [G].
      step_size: κ, in units of the value (of the gradient with step="raw"); a number or [G].
      num_steps: K, a number or [G]: groups may take different numbers of steps.
      bound: ε, radius of the ball; a number or [G]; inf: no projection.
        These four may be traced, and may be functions of step 0, `(losses [B], aux) -> number or [G]`.
      step: "unit" takes the group's mean gradient at length 1 (l2 over all axes), "sign" its sign, "raw" as it is.
      norm: "l2", "linf" or "l1" ball, over all axes of one group's delta.
      max_steps: static limit of K. None: read off `num_steps`, which must not be traced then.
      start: [G, ...] the delta to start from (random starts; deltas that persist over batches). None: zero.
      value_range: (low, high) that value + delta is clipped to, for pixels: after every step, if each sample has its own delta.
      transform: acts on the group mean gradient [G, ...] before the step (low-rank steps).
      pulls: losses [B] -> [B] bool, at every step: the gradients of the other samples count as zero (UAT's clipped loss).
      has_aux: whether `loss_of` returns (losses, aux).
      axis_name: mapped axis to average gradients over, for groups that span devices.

    Returns:
      delta [B, ...] to add to the value, and the `Search`.

    Raises:
      ValueError: `num_steps` is traced or a function and `max_steps` is None; shapes that don't fit; an unknown step or norm.

    >>> import optax
    >>> u, y = jnp.zeros([2, 2]), jnp.array([0, 0])
    >>> ce = lambda u: optax.softmax_cross_entropy_with_integer_labels(u, y)
    >>> delta, search = pgd(ce, u, y, 2, step_size=0.1, num_steps=2, step="raw")
    >>> print(np.asarray(delta).round(3))
    [[-0.102  0.102]
     [-0.102  0.102]]
    """
    check_choice("pgd", "step", step, ("raw", "unit", "sign"))
    check_choice("pgd", "norm", norm, NORMS)
    if groups is not None and groups.shape != value.shape[:1]:
        raise ValueError(f"pgd needs groups [B] for value [B, ...], got {groups.shape} and {value.shape}. Pass one per sample.")
    if groups is None and num_groups != value.shape[0]:
        raise ValueError(
            f"pgd needs num_groups = {value.shape[0]} (the batch) when groups is None, got {num_groups}. "
            "Without groups every sample has its own delta."
        )
    limit = _static_limit(num_steps, max_steps)
    value = jax.lax.stop_gradient(value)
    shape = (num_groups, *value.shape[1:])
    dtype = at_least_float32(value.dtype)
    # Samples of no group (padding) get a zero delta.
    members = lambda delta: delta.at[groups].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    spread = (lambda delta: delta) if groups is None else members

    def move(delta):
        """Per-sample delta, after clipping the sum to the range."""
        delta = spread(delta)
        if value_range is None:
            return delta
        low, high = value_range
        return jnp.clip(value.astype(dtype) + delta, low, high) - value.astype(dtype)

    def slope(delta):
        """(losses, aux) and the mean gradient of each group [G, ...], both constants."""
        point = jax.lax.stop_gradient(value.astype(dtype) + move(delta)).astype(value.dtype)

        def total(point):
            losses, aux = loss_of(point) if has_aux else (loss_of(point), None)
            return losses.sum(), (losses, aux)

        # Differentiated per sample and averaged afterwards: that is right under shard_map too, where a gradient with respect to
        # a shared delta would already be summed over devices.
        gradient, seen = jax.grad(total, has_aux=True)(point)
        if pulls is not None:
            gradient = jnp.where(per_group(pulls(seen[0]), gradient), gradient, jnp.zeros_like(gradient))
        mean = wide(gradient) if groups is None else class_mean(gradient, groups, num_groups, axis_name=axis_name)
        mean = mean.astype(dtype) if transform is None else transform(mean.astype(dtype))
        return jax.lax.stop_gradient((seen, mean))

    delta = jnp.zeros(shape, dtype) if start is None else jnp.asarray(start, dtype)
    if delta.shape != shape:
        raise ValueError(f"pgd needs start {shape} (one delta per group), got {delta.shape}. Give start=jnp.zeros({shape}).")
    # A sample's own delta keeps to the range, from the start on; a shared one is clipped where it is added to each sample.
    keep = move if groups is None else (lambda delta: delta)
    delta = keep(delta)
    (losses, aux), mean = slope(delta)
    resolve = lambda x: jnp.broadcast_to(jnp.asarray(x(losses, aux) if callable(x) else x, dtype), [num_groups])
    rate = resolve(direction) * resolve(step_size)
    count, radius = resolve(num_steps), resolve(bound)

    def advance(delta, mean, k):
        shaped = {"raw": lambda g: g, "unit": unit, "sign": jnp.sign}[step](mean)
        moved = delta + per_group(rate, delta) * shaped
        projected = keep(project(moved, radius, norm))
        return jnp.where(per_group(k < count, delta), projected, delta)

    last, seen = delta, aux
    if limit > 0:
        delta = advance(delta, mean, 0)
    if limit <= UNROLLED:
        unrolled = range(1, limit)
    else:
        unrolled = range(limit - has_aux, limit)  # the last step has something to hand out
        body = lambda delta, k: (advance(delta, slope(delta)[1], k), None)
        delta, _ = jax.lax.scan(body, delta, jnp.arange(1, unrolled.start, dtype=dtype))
    for k in unrolled:
        last, ((_, seen), mean) = delta, slope(delta)
        delta = advance(delta, mean, k)
    found = (jax.lax.stop_gradient(move(last)), seen) if has_aux else None
    return move(delta).astype(value.dtype), Search(losses, aux, delta, found)


def _static_limit(num_steps: Any, max_steps: int | None) -> int:
    if max_steps is not None:
        return int(max_steps)
    if callable(num_steps) or is_traced(num_steps):
        raise ValueError(
            "pgd needs max_steps when num_steps is traced or a function, got None: the loop's length is part of the program. "
            "Pass max_steps=10, the largest number of steps that will occur."
        )
    return int(np.max(np.asarray(num_steps)))
