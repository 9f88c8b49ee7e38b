r"""MixPert: hard samples (probably mislabelled) get their loss lowered at the logits, the others raised at the input.

    Σ_{l_i ≥ τ} min_{‖v_i‖∞ ≤ ε₁} ℓ(softmax(u_i + v_i), y_i)  +  Σ_{l_i < τ} max_{‖δ_i‖∞ ≤ ε₂} ℓ(softmax(f(x_i + δ_i)), y_i)     (eq. 57)

    form="step"   v_i = ε₁ (ŷ_i − softmax(u_i)), one gradient step, within the ball since |ŷ − p| ≤ 1        (eqs. 58–61, η = ε₁)
    form="ball"   v_i = ε₁ (2ŷ_i − 1), the exact minimum over the ball
    adaptive      ε₁ · l_i/τ in place of ε₁ and ε₂ · (2 − l_i/τ) in place of ε₂                               (eq. 66)

l_i is the loss of the clean pass; τ a number, or set so that the `pro` percent of the batch with the largest losses are the hard ones.
ε₂ = 0 is the thresholded form, eq. 56, at no cost; τ = ∞ with it is plain training. Algorithm 2 prints its two cases the wrong way
round; eq. 57 rules. Source: taxonomy paper, sections 5.2 and 6.5.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, check_samples, is_traced
from perturbjax.classes import AxisName, at_least_float32, gather, own_share, wide
from perturbjax.feature.adversarial import check_ball, check_inputs, pixel_range
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest, per_sample_keys
from perturbjax.method import method
from perturbjax.projection import per_group
from perturbjax.split import by_loss_top

_LIFT = "mixpert"  # in flow.extra: ε₁ of every sample [B], zero for those perturbed at the input
FORMS = ("step", "ball")


def mixpert_delta(
    logits: jax.Array, labels: jax.Array, *, bound: ArrayLike, form: Literal["step", "ball"] = "step"
) -> jax.Array:
    """v: [B, C], which lowers the loss of every sample; no gradient flows through it into the logits.

    Args:
      logits: [B, C], any float type (computed in at least float32). labels: [B] integers in 0..C-1.
      bound: ε₁, a number or [B]: zero leaves a sample alone.
      form: "step" (eq. 59) or "ball", the exact minimum over the l∞ ball.

    >>> print(mixpert_delta(jnp.array([[0.0, 0.0]]), jnp.array([1]), bound=2.0))
    [[-1.  1.]]
    """
    check_samples("mixpert_delta", logits, labels)
    check_number("mixpert_delta", low=0, bound=bound)
    check_choice("mixpert_delta", "form", form, FORMS)
    u = wide(jax.lax.stop_gradient(logits))
    return _lowering(u, jax.nn.one_hot(labels, u.shape[-1], dtype=u.dtype), bound, form)


def _lowering(u: jax.Array, targets: jax.Array, bound: ArrayLike, form: str) -> jax.Array:
    u, bound = jax.lax.stop_gradient(u), jnp.broadcast_to(jnp.asarray(bound, u.dtype), u.shape[:1])
    if form == "step":
        return bound[:, None] * (targets.astype(u.dtype) - jax.nn.softmax(u))
    return bound[:, None] * (2 * jax.nn.one_hot(jnp.argmax(targets, axis=-1), u.shape[-1], dtype=u.dtype) - 1)


def hard_samples(
    losses: jax.Array, *, tau: ArrayLike | None = None, pro: ArrayLike = 15.0, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array]:
    """(which samples are hard: l_i ≥ τ [B] bool, τ []), for a number τ, or for the `pro` percent of largest losses.

    Of B samples round(B·pro/100) are hard, ties by position; τ is then the smallest of their losses (none hard: the largest of all).
    With axis_name the batch is that of all devices.

    >>> print(*hard_samples(jnp.array([0.1, 3.0, 0.2, 2.0]), pro=50.0))
    [False  True False  True] 2.0
    """
    if tau is not None:
        threshold = jnp.asarray(tau, losses.dtype)
        return losses >= threshold, threshold
    everywhere = gather(losses, axis_name)
    hard = by_loss_top(everywhere, share=pro / 100) < 0
    return own_share(hard, axis_name), jnp.where(hard, everywhere, everywhere.max()).min()


class _Amounts(NamedTuple):
    """What the clean pass says of each sample [B]."""

    losses: jax.Array
    easy: jax.Array  # bool, whether its input is perturbed
    factor: jax.Array  # of its ball and steps (eq. 66)


def _easy_deltas(
    flow: Flow,
    rest: Rest,
    context: Context,
    amounts: Callable[[Flow], _Amounts],
    *,
    eps2: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    random_starts: bool,
    size: int,
    value_range: tuple[float, float] | None,
    units: tuple[float, ...] | None,
) -> tuple[jax.Array, Flow, jax.Array | None]:
    """(δ [B, ...] by PGD, zero for hard samples; the end of the clean pass; the `size` samples with the smallest losses, which alone the
    steps after the clean pass run on, as positions in the batch, None for all)."""
    x, count = flow.value, flow.labels.shape[0]
    unit = None if units is None else jnp.asarray(units, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    to_input = (lambda z: z) if unit is None else (lambda z: z * unit)
    z = x if unit is None else x / unit
    dtype = at_least_float32(x.dtype)
    scaled = lambda a, factor: jnp.asarray(a, dtype) * factor.astype(dtype)
    on = lambda found: found.easy.astype(dtype)
    search = dict(step="sign", norm="linf", value_range=pixel_range(value_range, context))
    if random_starts:
        end = jax.lax.stop_gradient(rest.flow(jax.lax.stop_gradient(x))[1])
        draw = jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], dtype, -1.0, 1.0))
        start, found = draw(per_sample_keys(context.key, flow.index)), amounts(end)
        delta = per_group(on(found) * scaled(eps2, found.factor), start) * start
    else:  # the first step's pass is the clean one
        delta, first = pgd(
            lambda z: rest.flow(to_input(z)), z, None, count, has_aux=True, num_steps=1,
            direction=lambda losses, end: on(amounts(end)), step_size=lambda losses, end: scaled(step_size, amounts(end).factor),
            bound=lambda losses, end: scaled(eps2, amounts(end).factor), **search,
        )  # fmt: skip
        end, found = first.aux, amounts(first.aux)
    rows = None if size == count else jnp.argsort(-found.losses, stable=True)[count - size :]
    some, part = (lambda a: a, rest) if rows is None else (lambda a: a[rows], rest.take(rows))
    if left := num_steps - (not random_starts):
        moved, _ = pgd(
            lambda z: part(to_input(z)), some(z), None, size, start=some(delta), num_steps=left, direction=some(on(found)),
            step_size=scaled(step_size, some(found.factor)), bound=scaled(eps2, some(found.factor)), **search,
        )  # fmt: skip
        delta = moved if rows is None else jnp.zeros_like(delta).at[rows].set(moved)
    return to_input(delta), end, rows


def _resolve(settings: dict) -> dict:
    """Which passes there are and, at most, how many percent of the batch are perturbed at the input: the program's structure."""
    passes, most = settings["passes"], settings["most"]
    if passes is None and is_traced((settings["eps2"], settings["clean_weight"])):
        raise ValueError(
            "mixpert needs passes when eps2 or clean_weight is traced, got None: whether inputs are perturbed is part of the program. "
            "Pass passes=1 (0: logits only, 2: a clean pass beside the perturbed one)."
        )
    if passes is None:
        passes = 0 if float(settings["eps2"]) == 0 else 1 + (float(settings["clean_weight"]) != 0)
    if most is None:
        traced = settings["tau"] is not None or is_traced(settings["pro"])
        most = 100 if traced else math.ceil(100 - float(settings["pro"]))
    return {"passes": passes, "most": most}


@method(
    target=("logit", "feature"), direction=(+1, -1), inference="adversarial", granularity="sample",
    cite="taxonomy paper, section 5.2", off=dict(eps1=0.0, eps2=0.0), resolve_structure=_resolve,
)  # fmt: skip
def mixpert(
    *,
    eps1: ArrayLike = 2.0,
    eps2: ArrayLike = 0.0,
    pro: ArrayLike = 15.0,
    tau: ArrayLike | None = None,
    form: Literal["step", "ball"] = "step",
    adaptive: bool = False,
    num_steps: int = 5,
    step_size: ArrayLike | None = None,
    random_starts: bool = False,
    clean_weight: ArrayLike = 0.0,
    site: str = "input",
    value_range: tuple[float, float] | None = (0.0, 1.0),
    units: tuple[float, ...] | None = None,
    passes: int | None = None,
    most: int | None = None,
) -> Perturbation | tuple[Perturbation, ...]:
    """MixPert: lowers the losses of the hardest samples at the logits, trains on adversarial inputs for the others.

    Args:
      eps1: ε₁ = η, how far logits are moved; the paper tries 0.5, 1, 2, 4 (its image code has 3, text 0.075).
      eps2: ε₂, how far inputs are moved (l∞); 0, the default, is the paper's best on clean data, and has no input pass. For the
        mixture it tries 8/255, 10/255, 12/255.
      pro: percent of each batch that counts as hard, at least about the share of wrong labels; the paper tries 0 to 50.
      tau: τ, a loss, instead of pro.
      form: of the logit part: "step" or "ball".
      adaptive: eq. 66: the harder a sample the further its logits move, the easier the further its input.
      num_steps, step_size: of PGD on the inputs; None: ε₂/4 (2/255 for 8/255).
      random_starts: start PGD from a random point of the ball (Madry et al., the official code), which costs a clean forward pass more:
        otherwise the first step's pass is the clean one.
      clean_weight: share of the clean loss in those of the samples perturbed at the input (official code: 0.4); not 0: one pass more.
      site: where δ acts: "input" (of texts their embedding), or another site with floating values.
      value_range: what perturbed inputs are clipped to; None: not. Other sites are never clipped.
      units: ε₂ and step size are in units of these numbers, one per channel: standard deviations, if they were meant for normalised
        inputs (official code: [0.229, 0.224, 0.225], value_range=none).
      passes: structure, which follows from the numbers: 0 logits only, 1 adversarial inputs, 2 clean ones too.
      most: structure: percent of the batch to run PGD on, at most (None: 100 − pro; all for a given tau, and on each device of
        per-device code, where the share of hard samples differs).

    The official image code is mixpert(eps1=3, eps2=8/255, step_size=2/255, random_starts=true, clean_weight=0.4,
    value_range=none, units=[0.229, 0.224, 0.225]). With mixed targets the step goes towards them, the ball to the dominant class.
    BatchNorm in PGD's passes after the clean one has the statistics of the samples that these run on.

    Metrics: hard, the share of hard samples; threshold, τ; inner_evaluations, gradients of the inputs per sample of the batch.
    """
    check_number("mixpert", low=0, eps1=eps1)
    check_number("mixpert", low=0, open_low=adaptive, infinite=True, tau=tau)
    check_number("mixpert", low=0, high=100, pro=pro)
    check_number("mixpert", low=0, high=1, clean_weight=clean_weight)
    check_number("mixpert", low=1, num_steps=num_steps)
    check_number("mixpert", low=0, open_low=True, units=units)
    check_choice("mixpert", "form", form, FORMS)
    span = value_range if units is None else None
    check_ball("mixpert", norm="linf", site=site, value_range=span, eps2=eps2, step_size=step_size)
    fixed = _resolve(dict(eps2=eps2, clean_weight=clean_weight, pro=pro, tau=tau, passes=passes, most=most))
    passes, most = fixed["passes"], fixed["most"]
    rate = eps2 / 4 if step_size is None else step_size

    def select(logits: jax.Array, flow: Flow, context: Context) -> tuple[jax.Array, jax.Array, jax.Array, dict]:
        """(losses [B], which are hard [B], l_i/τ [B] or ones, metrics) of the clean pass's logits."""
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits))
        losses = -jnp.sum(flow.targets.astype(log_p.dtype) * log_p, axis=-1)
        hard, threshold = hard_samples(losses, tau=tau, pro=pro, axis_name=context.axis_name)
        ratio = losses / jnp.maximum(threshold, 1e-12) if adaptive else jnp.ones_like(losses)
        return losses, hard, ratio, {"hard": jnp.mean(hard.astype(jnp.float32)), "threshold": threshold}

    def lift(hard: jax.Array, ratio: jax.Array) -> jax.Array:
        return jnp.where(hard, jnp.asarray(eps1, ratio.dtype) * ratio, 0)

    def init(context: Context) -> tuple:
        check_inputs("mixpert", context, span)
        return ()

    def at_inputs(flow: Flow, rest: Rest, state: tuple, context: Context):
        x, count = flow.value, flow.labels.shape[0]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"mixpert needs floating values at the site {site!r} for eps2 > 0, got {x.dtype}. "
                "Cut the model at a site that has them (pj.line) and name it, or write eps2=0."
            )

        def amounts(end: Flow) -> _Amounts:
            losses, hard, ratio, _ = select(end.trace["logits"], flow, context)
            return _Amounts(losses, ~hard, jnp.maximum(2 - ratio, 0) if adaptive else ratio)

        # The easy samples only, as far as their number is known: `most` percent of the batch, by their losses.
        size = count if context.axis_name is not None else min(count, max(1, -(-most * count // 100)))
        delta, end, rows = _easy_deltas(
            flow, rest, context, amounts, eps2=eps2, step_size=rate, num_steps=num_steps, random_starts=random_starts, size=size,
            value_range=span, units=units,
        )  # fmt: skip
        _, hard, ratio, metrics = select(end.trace["logits"], flow, context)
        first = not random_starts  # the first step has all samples
        metrics["inner_evaluations"] = jnp.asarray((count * first + size * (num_steps - first)) / count, jnp.float32)
        flow = flow._replace(extra={**flow.extra, _LIFT: lift(hard, ratio)})
        if passes == 2:
            some, part = (lambda a: a, rest) if rows is None else (lambda a: a[rows], rest.take(rows))
            clean, after = part.flow(some(x))
            share = jnp.where(hard, 0, jnp.asarray(clean_weight, flow.weights.dtype))
            paid = (some(share) * after.weights).astype(flow.penalty.dtype) * clean.astype(flow.penalty.dtype)
            flow = flow._replace(
                penalty=flow.penalty + (paid if rows is None else jnp.zeros_like(flow.penalty).at[rows].set(paid)),
                weights=flow.weights * (1 - share),
            )
            metrics["inner_evaluations"] += 1.5 * size / count  # this pass trains the network: three units, not two
        return flow._replace(value=x + delta), state, metrics

    def at_logits(flow: Flow, rest: Rest, state: tuple, context: Context):
        metrics: dict[str, Any] = {}
        if passes:
            amount = flow.extra.get(_LIFT)
            if amount is None:  # inside the search for the inputs
                return flow, state, metrics
        else:
            _, hard, ratio, metrics = select(flow.value, flow, context)
            amount = lift(hard, ratio)
        return flow._replace(value=flow.value + _lowering(flow.value, flow.targets, amount, form)), state, metrics

    logits = Perturbation("logits", lambda context: (), at_logits, reads_labels=True)
    if not passes:
        return logits
    return Perturbation(site, init, at_inputs, search=True), logits
