r"""LPG-PGD: the logit gradient's delta by steps on the norm of the class's parameter gradient.

    φ_c(δ) = ‖ mean_{i ∈ c} J_i (h_i + δ) ‖
    δ ← Π_{‖δ‖₂ ≤ ε_c}( δ + s_c · κ_c · step(∇φ_c(δ)) ),    from δ = 0, T times, κ_c = 2ε_c/T       (eqs. 16–17)

J_i [|W|, C] takes logit gradients to parameter gradients (the paper's Jᵀ is a misprint: g = J h). φ² is quadratic in δ, so that
one gradient and one product with its Hessian A = J̄ᵀJ̄, J̄ = mean J_i, for each step are all that is needed:

    ½∇φ²(δ) = b + A δ,    head: b = mean_i h_i (a_i·ā + 1), A = (‖ā‖² + 1)·I;    full: a pullback and a pushforward each

The head's 1 is the gradient of its bias, a parameter like the others (`bias=False` leaves it out). A dampened class stops at
the lowest point of each step's line: eq. 17 with a fixed κ walks past it (`clamp=False`). Source: LPG, section 3.4.4.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_samples
from perturbjax.classes import AxisName, wide
from perturbjax.gradient.lpg_groups import Granularity, lpg_groups
from perturbjax.projection import group_norm, unit

Step = Literal["sign", "unit"]
STEPS = ("sign", "unit")


def lpg_head_delta(
    logit_gradients: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    num_steps: int = 3,
    step_size: ArrayLike | None = None,
    step: Step = "sign",
    clamp: bool = True,
    bias: bool = True,
    granularity: Granularity = "category",
    axis_name: AxisName = None,
) -> jax.Array:
    """h̃ − h: [B, C], where J is that of the last linear layer u = W a + b: matrix products only.

    No gradient flows into h and a; derivatives with respect to direction, bound and step_size stay alive.

    Args:
      logit_gradients: h [B, C] per example, before any division by the batch size.
      features: a [B, d], what the last layer takes.
      labels: [B] integers in 0..C-1; others (padding) get zeros in jit.
      direction: s_c, +1 raises the norm, −1 lowers it, 0 leaves it alone; a number or [C].
      bound: ε_c, radius of the ball, in units of ‖h‖₂; a number or [C]. num_steps: T, a loop that is unrolled.
      step_size: κ, a number or [C]; None: 2ε_c/T. These three may be traced.
      step: "sign" (the paper's: its length is κ√C, so that the default κ meets the ball at once) or "unit" (length κ, which for the
        head leads straight to the exact solution).
      clamp: a step down stops at the lowest point of its line.
      bias: whether the last layer has a bias.
      granularity: one delta per class, or one per sample (then J_i is the sample's own).
      axis_name: mapped axis to take class means over.

    Raises:
      ValueError: shapes that don't fit; other labels or numbers that aren't finite (outside jit).

    >>> h, a, y = jnp.array([[-0.6, 0.4, 0.2], [-0.3, 0.3, 0.0]]), jnp.ones([2, 4]), jnp.array([0, 0])
    >>> print(lpg_head_delta(h, a, y, direction=1.0, bound=0.3).round(3))
    [[-0.173  0.173  0.173]
     [-0.173  0.173  0.173]]
    """
    check_samples("lpg_head_delta", logit_gradients, labels, what="logit gradients")
    if features.ndim != 2 or features.shape[0] != labels.shape[0]:
        raise ValueError(
            f"lpg_head_delta needs features [B, d] and labels [B], got {features.shape} and {labels.shape}. "
            "Pass what the last linear layer takes: features.reshape(B, -1)."
        )
    return head_search(
        logit_gradients, features, labels, bias=bias, granularity=granularity, axis_name=axis_name, direction=direction, bound=bound,
        num_steps=num_steps, step_size=step_size, step=step, clamp=clamp,
    )  # fmt: skip


def head_search(
    logit_gradients: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    *,
    bias: bool,
    granularity: Granularity,
    axis_name: AxisName,
    **steps: Any,
) -> jax.Array:
    """`lpg_head_delta` without its checks; steps: its other settings."""
    h, a = (wide(jax.lax.stop_gradient(x)) for x in (logit_gradients, features))
    a = a.astype(h.dtype)
    groups = lpg_groups(labels, h.shape[-1], granularity, axis_name=axis_name)
    mean, one = groups.mean(a), jnp.asarray(bias, h.dtype)
    slope = groups.mean(h * (jnp.sum(a * groups.spread(mean), axis=-1) + one)[:, None])
    steepness = jnp.sum(mean**2, axis=-1) + one
    return _search(slope, lambda d: steepness[:, None] * d, groups, **steps)


def lpg_full_delta(
    logit_gradients: jax.Array,
    labels: jax.Array,
    pullback: Callable[[jax.Array], Any],
    *,
    direction: ArrayLike,
    bound: ArrayLike,
    num_steps: int = 3,
    step_size: ArrayLike | None = None,
    step: Step = "sign",
    clamp: bool = True,
    granularity: Granularity = "category",
    axis_name: AxisName = None,
) -> jax.Array:
    """h̃ − h: [B, C], where J is that of all parameters that `pullback` returns; derivatives as in `lpg_head_delta`.

    For small networks, and to check the head with: T + 1 pullbacks and pushforwards for each class (or sample), one program that is
    vmapped over them, with room for as many gradients. The pushforward is the pullback of the pullback, so that models whose layers
    know no forward mode do too.

    Args:
      pullback: cotangents of the logits [B, C] -> gradients of the parameters, any tree: `lambda v: jax.vjp(f, params)[1](v)`.
        A constant factor (1/B) changes nothing. In per-device code, of this device's samples.
      The others: see `lpg_head_delta`.
    """
    check_samples("lpg_full_delta", logit_gradients, labels, what="logit gradients")
    return full_search(
        logit_gradients, labels, pullback, granularity=granularity, axis_name=axis_name, direction=direction, bound=bound,
        num_steps=num_steps, step_size=step_size, step=step, clamp=clamp,
    )  # fmt: skip


def full_search(
    logit_gradients: jax.Array,
    labels: jax.Array,
    pullback: Callable[[jax.Array], Any],
    *,
    granularity: Granularity,
    axis_name: AxisName,
    **steps: Any,
) -> jax.Array:
    """`lpg_full_delta` without its checks; steps: its other settings."""
    given = jax.lax.stop_gradient(logit_gradients)
    h = wide(given)
    groups = lpg_groups(labels, h.shape[-1], granularity, axis_name=axis_name)
    weights = groups.weights(h.dtype)
    push = jax.vjp(pullback, jnp.zeros_like(given))[1]

    def there_and_back(weight, cotangents):
        """mean_i J_iᵀ (mean_j J_j v_j), means over one group: [C]."""
        own = pullback((weight[:, None] * cotangents).astype(given.dtype))
        # 0·own: under shard_map the sum then counts as varying over devices exactly where `own` does, which `push` asks for.
        total = jax.tree.map(lambda x, y: x + 0 * y, groups.total(own), own) if axis_name is not None else own
        [rows] = push(total)
        return jnp.matmul(weight, wide(rows).astype(h.dtype), precision=jax.lax.Precision.HIGHEST)

    def bend(d):
        each = jax.vmap(lambda weight, v: there_and_back(weight, jnp.broadcast_to(v[None], h.shape)))
        return groups.total(each(weights, d))

    slope = groups.total(jax.vmap(lambda weight: there_and_back(weight, h))(weights))
    return _search(slope, bend, groups, **steps)


def _search(slope, bend, groups, *, direction, bound, num_steps, step_size, step, clamp):
    """The steps on ½φ², whose gradient is slope + bend(δ), slope [G, C] and bend linear; spread to [B, C]."""
    check_choice("lpg", "step", step, STEPS)
    num_classes, dtype = slope.shape[-1], slope.dtype
    of_groups = lambda x: groups.of_class(jnp.broadcast_to(jnp.asarray(x, dtype), [num_classes]))
    radius = of_groups(bound)
    rate = 2 * radius / num_steps if step_size is None else of_groups(step_size)
    amount = of_groups(direction) * rate
    delta = bent = jnp.zeros_like(slope)
    for _ in range(num_steps):
        gradient = jax.lax.stop_gradient(slope + bent)
        along = jnp.sign(gradient) if step == "sign" else unit(gradient)
        along_bent = jax.lax.stop_gradient(bend(along))
        length = amount
        if clamp:
            curvature = jnp.sum(along * along_bent, axis=-1)
            lowest = jnp.sum(along * gradient, axis=-1) / jnp.where(curvature > 0, curvature, 1)
            length = jnp.maximum(amount, -lowest)
        delta, bent = (x + length[:, None] * d for x, d in ((delta, along), (bent, along_bent)))
        norm = group_norm(delta)
        shrink = jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))[:, None]
        delta, bent = shrink * delta, shrink * bent
    return groups.spread(delta)
