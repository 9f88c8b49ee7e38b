"""Splits: which classes (or samples) have their loss raised (+1) and which have it lowered (−1).

The papers call raising the loss *positive augmentation* (LPL, LPG, LPA) or *negative perturbation* (the taxonomy); here it is
the direction +1. A split keeps its own running statistic, taken from the clean pass (of a net
trained on attacked inputs, as with AT and C-UAT, the attacked one: there is no other); a class never seen has direction 0.

    by_accuracy    +1 if q̄_c ≤ τ                 LPL eqs. 12–13, LPG eq. 18
    by_frequency   +1 if class c is rare          LPL eq. 14, LPG eq. 19
    by_variance    −1 if Var(h_c) > τ_v           LPG eq. 20
    all_classes    one direction for every class  adversarial training, domain generalization
    by_loss, by_loss_top   −1 for samples of large loss    MixPert (taxonomy section 5.2)

Each statistic also comes on a [0, 1] scale with the threshold on the same scale, which is what varied bounds are made of.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, nearest
from perturbjax.classes import RunningMean, own_entries, running_mean_init, running_mean_update, wide
from perturbjax.link import Context
from perturbjax.rounding import rounded, rounded_down

Update = Literal["step", "epoch"]


class Clean(NamedTuple):
    """What a split reads of the clean pass."""

    logits: jax.Array  # [B, C]
    labels: jax.Array  # [B]
    targets: jax.Array  # [B, C]


class Split(NamedTuple):
    """A split of the classes, as pure functions of its own state."""

    init: Callable[[Context], Any]
    update: Callable[[Any, Clean, Context], Any]  # the state after the clean pass of a batch
    direction: Callable[[Any, Context], jax.Array]  # [C] of +1, −1, 0
    statistic: Callable[[Any, Context, str], tuple[jax.Array, jax.Array]]  # (s_c in [0, 1] [C], τ on the same scale [])
    needs: tuple[str, ...] = ()  # what the link must be given: "class_counts"
    accuracy: Callable[[Any, Context], jax.Array] | None = None  # q̄ [C], where the split keeps it
    share: Any = None  # τ of a split whose s_c are shares, where it is a number; above 1 a varied bound is none


SCALES = ("rank", "linear", "log")


def by_accuracy(
    tau: ArrayLike | str = "mean",
    measure: Literal["probability", "top1"] = "probability",
    update: Literal["step", "epoch", "batch"] = "step",
    decay: ArrayLike = 0.9,
    over: Literal["seen", "all"] = "seen",
) -> Split:
    """+1 for the classes that are learnt badly.

    Args:
      tau: "mean" or "median" of q̄ over the classes seen, or a number in [0, 1] (or above: all +1).
      measure: q̄_c is the mean probability of the true class (LPL eq. 13; +1 if q̄_c ≤ τ), or the top-1 accuracy (LPG; q̄_c < τ).
      update: running mean over steps with `decay`, or over whole epochs (then the first epoch has direction 0), or of this batch
        alone ("batch": as LPL's code has it; a class absent from the batch is not seen).
      over: "all" takes τ over all C classes, those not seen with q̄ = 0, which then count as learnt badly. With update="batch" that is
        LPL's code, whose τ is too low by the share of classes absent from a batch.
    """
    _check_tau("by_accuracy", tau, ("mean", "median"))
    check_choice("by_accuracy", "measure", measure, ("probability", "top1"))
    check_choice("by_accuracy", "update", update, ("step", "epoch", "batch"))
    check_choice("by_accuracy", "over", over, ("seen", "all"))
    check_number("by_accuracy", low=0, high=1, decay=decay)

    def score(clean: Clean) -> jax.Array:
        if measure == "top1":
            right = jnp.argmax(clean.logits, axis=-1).astype(clean.labels.dtype) == clean.labels
            return right.astype(wide(clean.logits).dtype)
        probability = jax.nn.softmax(wide(clean.logits), axis=-1)
        # Clipped: a label outside 0..C-1 (padding) gives some number, not a nan that would spread to the sums of all classes.
        return own_entries(probability, clean.labels)

    def advance(state: RunningMean, clean: Clean, context: Context) -> RunningMean:
        before = running_mean_init(context.num_classes, dtype=context.dtype) if update == "batch" else state
        return running_mean_update(
            before, score(clean), clean.labels, update="epoch" if update == "epoch" else "step", decay=decay,
            epoch=context.epoch if update == "epoch" else 0, axis_name=context.axis_name,
        )  # fmt: skip

    def counted(state: RunningMean) -> jax.Array:
        return state.seen | (over == "all")

    def direction(state: RunningMean, context: Context) -> jax.Array:
        threshold = _threshold(tau, state.mean, counted(state))
        low = state.mean <= threshold if measure == "probability" else state.mean < threshold
        return jnp.where(counted(state), jnp.where(low, 1.0, -1.0), 0.0)

    return Split(
        lambda context: running_mean_init(context.num_classes, dtype=context.dtype),
        advance,
        direction,
        lambda state, context, scale: (state.mean, jnp.clip(_threshold(tau, state.mean, counted(state)), 0, 1)),
        accuracy=lambda state, context: state.mean,
        share=None if isinstance(tau, str) else tau,
    )


def by_frequency(
    tau: ArrayLike | str | None = None, rule: Literal["rank", "count"] = "rank", accuracy: Split | None = None
) -> Split:
    """+1 for the rare classes.

    Args:
      rule: "rank": the first τ·C classes by count are −1, the rest +1 (LPL eqs. 14, 18: −1 where c ≤ τ; the paper tries shares of
        0.4, 0.5 and 0.6). "count": +1 where N_c < τ (LPG eq. 19).
      tau: a share of the classes for "rank" (None: 0.5); a number of samples or "median" (None) for "count".
      accuracy: a split by accuracy whose q̄ is kept beside, for `varied_by_frequency(of="accuracy")` (LPL eq. 18 as printed).
    """
    check_choice("by_frequency", "rule", rule, ("rank", "count"))
    _check_tau("by_frequency", tau, ("median",))
    tau = "median" if tau is None else tau
    share = 0.5 if isinstance(tau, str) else tau
    if rule == "rank":
        check_number("by_frequency", low=0, high=1, tau=share)
    if accuracy is not None and getattr(accuracy, "accuracy", None) is None:
        raise ValueError(
            f"by_frequency needs accuracy to be a split by accuracy, got {type(accuracy).__name__} without one. "
            "Write accuracy=by_accuracy()."
        )

    def counts(context: Context) -> jax.Array:
        return jnp.asarray(context.class_counts, context.dtype)

    def rank(context: Context) -> jax.Array:
        """1 for the most frequent class … C for the rarest; ties in the order of the labels."""
        order = jnp.argsort(-counts(context), stable=True)
        places = jnp.arange(1, context.num_classes + 1, dtype=context.dtype)
        return jnp.zeros_like(places).at[order].set(places)

    def limit(context: Context) -> jax.Array:
        """The threshold in samples (rule "count")."""
        return _threshold(tau, counts(context), jnp.ones([context.num_classes], bool))

    def head(context: Context) -> jax.Array:
        """How many classes are −1 (rule "rank")."""
        return rounded_down(jnp.asarray(share, context.dtype) * context.num_classes)

    def direction(state: tuple, context: Context) -> jax.Array:
        if rule == "count":
            return jnp.where(counts(context) < limit(context), 1.0, -1.0)
        return jnp.where(rank(context) <= head(context), -1.0, 1.0)

    def statistic(state: tuple, context: Context, scale: str) -> tuple[jax.Array, jax.Array]:
        n = counts(context)
        if rule == "rank":
            edge = jnp.sort(n)[::-1][jnp.clip(head(context), 1, context.num_classes).astype(jnp.int32) - 1]
        else:
            edge = limit(context)
        if scale == "rank":
            place = jnp.asarray(share, n.dtype) if rule == "rank" else jnp.mean((n >= edge).astype(n.dtype))
            return rank(context) / context.num_classes, place
        if scale == "linear":
            return n / n.max(), jnp.clip(edge / n.max(), 0, 1)
        low, high = jnp.log(jnp.maximum(n.min(), 1)), jnp.log(jnp.maximum(n.max(), 1))
        to_unit = lambda x: (jnp.log(jnp.maximum(x, 1)) - low) / jnp.maximum(high - low, 1e-6)
        return to_unit(n), jnp.clip(to_unit(edge), 0, 1)

    needs = ("class_counts",)
    if accuracy is None:
        return Split(lambda context: (), lambda state, clean, context: (), direction, statistic, needs)
    return Split(accuracy.init, accuracy.update, direction, statistic, needs, accuracy.accuracy)


class VarianceState(NamedTuple):
    """Running moments of the logit gradient h by class."""

    mean: RunningMean  # of h: [C, C]
    square: RunningMean  # of ‖h‖²: [C]


def by_variance(tau: ArrayLike | str = "mean", update: Update = "epoch", decay: ArrayLike = 0.9) -> Split:
    """−1 for the classes whose logit gradients h = p − y scatter most (many wrong labels): Var(h_c) = E‖h‖² − ‖E h‖² > τ.

    Args:
      tau: "mean" or "median" of the variances, or a number.
      update, decay: as in `by_accuracy`.
    """
    _check_tau("by_variance", tau, ("mean", "median"))
    check_choice("by_variance", "update", update, ("step", "epoch"))
    check_number("by_variance", low=0, high=1, decay=decay)

    def init(context: Context) -> VarianceState:
        return VarianceState(
            running_mean_init(context.num_classes, (context.num_classes,), dtype=context.dtype),
            running_mean_init(context.num_classes, dtype=context.dtype),
        )

    def advance(state: VarianceState, clean: Clean, context: Context) -> VarianceState:
        p = jax.nn.softmax(wide(clean.logits), axis=-1)
        h = p - clean.targets.astype(p.dtype)
        epoch = context.epoch if update == "epoch" else 0
        options = dict(update=update, decay=decay, epoch=epoch, axis_name=context.axis_name)
        return VarianceState(
            running_mean_update(state.mean, h, clean.labels, **options),
            running_mean_update(state.square, jnp.sum(h**2, axis=-1), clean.labels, **options),
        )

    def variance(state: VarianceState) -> jax.Array:
        return jnp.maximum(state.square.mean - jnp.sum(state.mean.mean**2, axis=-1), 0)

    def direction(state: VarianceState, context: Context) -> jax.Array:
        spread, seen = variance(state), state.square.seen
        return jnp.where(seen, jnp.where(spread > _threshold(tau, spread, seen), -1.0, 1.0), 0.0)

    def statistic(state: VarianceState, context: Context, scale: str) -> tuple[jax.Array, jax.Array]:
        spread, seen = variance(state), state.square.seen
        top = jnp.maximum(spread.max(), 1e-12)
        return spread / top, jnp.clip(_threshold(tau, spread, seen) / top, 0, 1)

    return Split(init, advance, direction, statistic)


def all_classes(direction: ArrayLike = 1.0) -> Split:
    """The same direction (a number), or a given one per class ([C])."""
    check_number("all_classes", low=-1, high=1, direction=direction)

    def constant(state: tuple, context: Context) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(direction, context.dtype), [context.num_classes])

    def statistic(state: tuple, context: Context, scale: str) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros([context.num_classes], context.dtype), jnp.zeros([], context.dtype)  # a varied bound is its base here

    return Split(lambda context: (), lambda state, clean, context: (), constant, statistic)


def by_loss(losses: jax.Array, *, tau: ArrayLike) -> jax.Array:
    """Per sample: −1 where the loss [B] is at least τ, +1 elsewhere (taxonomy eq. 57). Returns [B]."""
    return jnp.where(losses >= tau, -1.0, 1.0)


def by_loss_top(losses: jax.Array, *, share: ArrayLike) -> jax.Array:
    """Per sample: −1 for the `share` (0..1) of the batch with the largest losses [B], +1 for the others. Returns [B].

    The number is round(share·B), a half to the even number, ties by position (taxonomy section 5.2: τ by the top percent).
    """
    check_number("by_loss_top", low=0, high=1, share=share)
    rank = jnp.argsort(jnp.argsort(-losses, stable=True), stable=True)
    number = rounded(jnp.asarray(share, wide(losses).dtype) * losses.shape[0]).astype(rank.dtype)
    return jnp.where(rank < number, -1.0, 1.0)


SPLITS: dict[str, Callable[..., Split]] = {
    "accuracy": by_accuracy,
    "frequency": by_frequency,
    "variance": by_variance,
    "all": all_classes,
}


def as_split(function: str, split: Split | str, *, tau: Any = None, direction: Any = None, **defaults: Any) -> Split:
    """A method's settings `split`, `tau` and `direction` as one Split.

    A name ("accuracy", "frequency", "variance", "all") takes `tau` and the method's own defaults for it
    (`{"accuracy": {...}}`); a given direction overrides the split.
    """
    if direction is not None:
        return all_classes(direction=direction)
    if isinstance(split, Split):
        if tau is not None:
            raise ValueError(f"{function} needs tau inside the split, got both. Write split=by_accuracy(tau={tau}).")
        return split
    name = split.removeprefix("by_") if isinstance(split, str) else None
    if name not in SPLITS:
        if callable(split):
            given = getattr(split, "__name__", "f")
            raise ValueError(f"{function} needs a Split, got the function {given}. Call it: split={given}().")
        raise ValueError(f"{function} needs split to be a Split or a name, got {split!r}. {nearest(str(split), SPLITS)}")
    settings = dict(defaults.get(name, {}))
    if tau is not None:
        if name == "all":
            raise ValueError(f"{function} needs no tau with split='all', got {tau}. Leave it out, or set direction=.")
        settings["tau"] = tau
    return SPLITS[name](**settings)


def _threshold(tau: Any, values: jax.Array, seen: jax.Array) -> jax.Array:
    """tau as a number: itself, or the mean or median of `values` over the classes seen."""
    if not isinstance(tau, str):
        return jnp.asarray(tau, values.dtype)
    if tau == "mean":
        return jnp.sum(jnp.where(seen, values, 0)) / jnp.maximum(seen.sum(), 1).astype(values.dtype)
    return jnp.nan_to_num(jnp.nanmedian(jnp.where(seen, values, jnp.nan)))


def _check_tau(function: str, tau: Any, words: tuple[str, ...]) -> None:
    if isinstance(tau, str):
        check_choice(function, "tau", tau, words)
    else:
        check_number(function, low=0, infinite=True, tau=tau)
