"""Bounds: how far a delta may go, for each class.

    fixed                 ε_c = ε
    varied                ε_c = ε + Δε · |τ − s_c|          LPL eq. 18 first case, LPG eq. 21, LPA eq. 14
    varied_by_frequency   ε_c = ε + Δε · s_c/s_1 (head), ε + Δε · s_C/s_c (tail)      LPL eq. 18 second case, s = π or q̄
    layer_scaled          ε_c^(l) = β^(L−l) · ε_c           LPA eq. 15
    any optax schedule    ε(step)
    cosine, linear        ε(progress), from one number to another over the run      (a curriculum)

A method's setting `bound` takes a number, an array [C] or one of these. A negative bound would turn the direction round: it is an error
where it can be seen, and becomes nan where it can't (schedules, traced numbers), for the trainer to see.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.link import Context
from perturbjax.parameter.timing import Course, Place, check_setting, not_negative
from perturbjax.split import SCALES, Split


class Varied(NamedTuple):
    """ε_c = ε + Δε·|τ − s_c|; made by `varied`."""

    eps: ArrayLike | None
    delta_eps: ArrayLike | None
    statistic: str


class VariedByFrequency(NamedTuple):
    """LPL's second case; made by `varied_by_frequency`."""

    eps: ArrayLike | None
    delta_eps: ArrayLike | None
    of: str


class LayerScaled(NamedTuple):
    """β^(L−l) times another bound; made by `layer_scaled`."""

    bound: Any
    beta: ArrayLike


Bound = ArrayLike | Varied | VariedByFrequency | LayerScaled | Course | Callable[[ArrayLike], ArrayLike]


def varied(
    eps: ArrayLike | None = None, delta_eps: ArrayLike | None = None, statistic: Literal["rank", "linear", "log"] = "rank"
) -> Varied:
    """ε_c = ε + Δε·|τ − s_c|: classes further from the split's threshold get a larger bound.

    Args:
      eps: base ε. None: the method's own default bound.
      delta_eps: Δε. None: as large as ε.
      statistic: for splits by frequency, s_c is the rank/C, N_c/max N, or log N_c scaled to [0, 1]; others have one scale.
    """
    check_number("varied", low=0, eps=eps, delta_eps=delta_eps)
    check_choice("varied", "statistic", statistic, SCALES)
    return Varied(eps, delta_eps, statistic)


def varied_by_frequency(
    eps: ArrayLike | None = None, delta_eps: ArrayLike | None = None, of: Literal["prior", "accuracy"] = "prior"
) -> VariedByFrequency:
    """Head classes ε + Δε·s_c/s_1, tail classes ε + Δε·s_C/s_c, with s the class prior π (the official code) or q̄ (as printed).

    Head and tail are the split's −1 and +1; 1 and C are the most and the least frequent class. `of="accuracy"` needs a split that
    keeps q̄: `by_accuracy()`, or `by_frequency(accuracy=by_accuracy())` for eq. 18 as printed. Ratios above 1 (a tail class learnt
    worse than the rarest one) count as 1, so that ε + Δε is the largest bound.
    """
    check_number("varied_by_frequency", low=0, eps=eps, delta_eps=delta_eps)
    check_choice("varied_by_frequency", "of", of, ("prior", "accuracy"))
    return VariedByFrequency(eps, delta_eps, of)


def layer_scaled(bound: Bound | None = None, beta: ArrayLike = 0.7) -> LayerScaled:
    """γ_l = β^(L−l) times `bound` at site number l (logits: stages + 1; features count as the last stage)."""
    check_number("layer_scaled", low=0, high=1, open_low=True, beta=beta)
    return LayerScaled(bound, beta)


def radius(
    bound: Bound | None, *, default: float, split: Split, state: Any, context: Context, site: str | None = None
) -> jax.Array:
    """ε_c of every class, [C]: `bound` with the split's statistics in `state`, at the context's place in training; nan, not negative."""
    return not_negative(_radius(bound, default=default, split=split, state=state, context=context, site=site))


def _radius(bound: Bound | None, *, default: float, split: Split, state: Any, context: Context, site: str | None) -> jax.Array:
    if isinstance(bound, LayerScaled):
        if site is None or context.level is None:
            raise ValueError("layer_scaled needs a site, got none. Use it with a method that has one, such as lpa(site=...).")
        inner = _radius(bound.bound, default=default, split=split, state=state, context=context, site=None)
        return inner * jnp.asarray(bound.beta, inner.dtype) ** (context.level("logits") - context.level(site))
    if isinstance(bound, Varied | VariedByFrequency):
        eps, delta_eps = _amounts(bound, default)
        share = _share(bound, split, state, context)
        return jnp.asarray(eps, share.dtype) + jnp.asarray(delta_eps, share.dtype) * share
    if isinstance(bound, Course):
        value: Any = bound.at(Place(step=None, progress=jnp.asarray(context.progress, context.dtype), value=None, rate=None))
    else:
        value = default if bound is None else bound(context.step) if callable(bound) else bound
    return jnp.broadcast_to(jnp.asarray(value, context.dtype), [context.num_classes])


def largest(bound: Bound | None, *, default: float) -> float | None:
    """The largest ε_c that `bound` can give; None if it can't be known here (traced, or a schedule)."""
    if isinstance(bound, LayerScaled):
        return largest(bound.bound, default=default)
    if isinstance(bound, Varied | VariedByFrequency):
        eps, delta_eps = _amounts(bound, default)
        return None if is_traced((eps, delta_eps)) else float(np.max(np.asarray(eps))) + float(np.max(np.asarray(delta_eps)))
    if isinstance(bound, Course):
        ends = bound.first, bound.last
        return None if is_traced(ends) else max(map(float, ends))
    value = default if bound is None else bound
    return None if callable(value) or is_traced(value) else float(np.max(np.asarray(value)))


def check_bound(function: str, bound: Bound | None) -> None:
    """Raises ValueError for a bound that is negative, nan or no bound at all: of schedules some steps, traced numbers pass."""
    if isinstance(bound, LayerScaled):
        check_bound(function, bound.bound)
    elif isinstance(bound, Course) or callable(bound):
        check_setting(function, rate=False, bound=bound)
    elif not isinstance(bound, Varied | VariedByFrequency):
        check_number(function, low=0, infinite=True, bound=bound)


def needs(bound: Bound | None, split: Split) -> tuple[str, ...]:
    """What a link with this bound and split must be given (see Perturbation.needs).

    Raises:
      ValueError: the bound is made of accuracies, and the split keeps none; or it is varied, and the split's τ beyond all of them.
    """
    if needs_accuracy(bound):
        _accuracy_of(split)
    inner = bound.bound if isinstance(bound, LayerScaled) else bound
    if isinstance(inner, Varied) and not is_traced(split.share):
        if split.share is not None and np.max(np.asarray(split.share)) > 1:
            raise ValueError(
                f"varied needs a split whose tau is in [0, 1], as the accuracies that it is compared with, got {split.share}. Write tau=1."
            )
    return ("class_counts",) if isinstance(inner, VariedByFrequency) else split.needs


def needs_accuracy(bound: Bound | None) -> bool:
    """Whether `bound` is made of the classes' accuracies."""
    inner = bound.bound if isinstance(bound, LayerScaled) else bound
    return isinstance(inner, VariedByFrequency) and inner.of == "accuracy"


def _accuracy_of(split: Split) -> Callable[[Any, Context], jax.Array]:
    if split.accuracy is None:
        raise ValueError(
            "varied_by_frequency(of='accuracy') needs a split that keeps accuracies, got one without. "
            "Write split=by_frequency(accuracy=by_accuracy())."
        )
    return split.accuracy


def _amounts(bound: Varied | VariedByFrequency, default: float) -> tuple[Any, Any]:
    eps = default if bound.eps is None else bound.eps
    return eps, eps if bound.delta_eps is None else bound.delta_eps


def _share(bound: Varied | VariedByFrequency, split: Split, state: Any, context: Context) -> jax.Array:
    """What Δε is multiplied with, in [0, 1]: [C]."""
    if isinstance(bound, Varied):
        s, tau = split.statistic(state, context, bound.statistic)
        if is_traced(split.share):  # other numbers were seen by `needs`
            tau = jnp.where(jnp.asarray(split.share, tau.dtype) > 1, jnp.nan, tau)
        return jnp.abs(jnp.clip(tau, 0, 1) - s)
    n = jnp.asarray(context.class_counts, context.dtype)
    s = n if bound.of == "prior" else _accuracy_of(split)(state, context)
    first, last = s[jnp.argmax(n)], s[jnp.argmin(n)]
    ratio = lambda a, b: jnp.clip(a / jnp.where(b > 0, b, 1), 0, 1)
    return jnp.where(split.direction(state, context) < 0, ratio(s, first), ratio(last, s))
