r"""LogPert: every sample may move its own logits to lower its loss, and pays for how far; wrong labels pay most.

    Σ_i  min_{v_i} ℓ(softmax(u_i + v_i), y_i) + λ · Reg(v_i)                                   (eqs. 52–55)

    l1   Reg(v) = ‖v‖₁, whose solution is exact: only the true class moves, until its probability is 1 − λ:
         v_y = max(0, log((1 − λ)/λ) − (u_y − logsumexp_{j≠y} u_j)),   v_j = 0 for j ≠ y
    l2   Reg(v) = ‖v‖²₂ (our reading, for comparison): v = (y − softmax(u + v))/(2λ), every entry of every sample moves

λ ≥ 1 gives v = 0 with l1: plain training. ‖v_i‖₁ accumulated over training says whose label is probably wrong (section 6.3, Figs. 6–7).
Source: taxonomy paper, section 5.1, Algorithm 1; the joint search as in the authors' image code.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, check_samples, is_traced
from perturbjax.classes import at_least_float32, gather, wide
from perturbjax.inference.proximal import CROSS_ENTROPY_STEP, REGULARISERS, Regulariser, proximal_search, proximal_step
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.table import add, new_table, read, write

SEARCHES = ("exact", "acs", "joint")
STEP_SIZES = {"exact": 0.0, "acs": CROSS_ENTROPY_STEP, "joint": 6.0}


def logpert_delta(logits: jax.Array, labels: jax.Array, *, weight: ArrayLike, norm: Regulariser = "l1") -> jax.Array:
    """v: [B, C], the exact solution for each sample; no gradient flows through it into the logits.

    Args:
      logits: [B, C], any float type (computed in at least float32).
      labels: [B] integers in 0..C-1; others (padding) get zeros in jit.
      weight: λ > 0.
      norm: "l1" in closed form, "l2" (squared) by proximal steps until they stop moving.

    Raises:
      ValueError: λ ≤ 0, shapes that don't fit; where they can be seen (outside jit) other labels, nan and infinity.

    >>> print(logpert_delta(jnp.array([[3.0, 0.8, 0.2]]), jnp.array([1]), weight=0.35).round(2))
    [[0.   2.88 0.  ]]
    """
    check_samples("logpert_delta", logits, labels)
    check_number("logpert_delta", low=0, open_low=True, weight=weight)
    check_choice("logpert_delta", "norm", norm, REGULARISERS)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=at_least_float32(logits.dtype))
    return _exact(logits, targets, targets, weight, norm)


def _exact(logits: jax.Array, targets: jax.Array, own: jax.Array, weight: ArrayLike, norm: Regulariser) -> jax.Array:
    """v [B, C] for targets [B, C] whose label is one-hot `own` [B, C].

    With soft targets the l1 form moves the labelled class alone, up to probability y_y − λ: the solution along that entry.
    """
    u = wide(jax.lax.stop_gradient(logits))
    targets, own = targets.astype(u.dtype), own.astype(u.dtype)
    if norm == "l2":
        slope = lambda v: jax.nn.softmax(u + v) - targets
        return proximal_search(slope, jnp.zeros_like(u), weight=weight, norm="l2")
    share, weight = jnp.sum(own * targets, axis=-1), jnp.asarray(weight, u.dtype)
    odds = jnp.sum(own * u, axis=-1) - jax.nn.logsumexp(jnp.where(own > 0, -jnp.inf, u), axis=-1)  # log p_y/(1 − p_y)
    goal = share - weight  # 1 − λ
    safe = jnp.where(goal > 0, goal, 1)
    lift = jnp.log(safe) - jnp.log(1 - share + weight) - odds
    return own * jnp.where(goal > 0, jnp.maximum(lift, 0), 0)[:, None]


class LogPertState(NamedTuple):
    """Tables by sample; () for those that the settings don't need."""

    delta: Any  # [N, C], v_i of the last visit ("acs", "joint")
    momentum: Any  # [N, C], of "joint"
    size: Any  # [N], ‖v_i‖₁ summed over the visits so far (memory)
    visits: Any  # [N] int32 (memory)


def perturbation_sizes(states: Any) -> tuple[jax.Array, jax.Array]:
    """(Σ over visits of ‖v_i‖₁ [N], visits [N]) out of a state trained with `logpert(memory=True)`: the evidence of a label audit.

    states: whatever holds the link's state: its own, the chain's (`Output.states`), a whole `TrainState`.

    Raises:
      ValueError: there is no such memory in it.
    """
    mine = lambda x: isinstance(x, LogPertState)
    for state in filter(mine, jax.tree.leaves(states, is_leaf=mine)):
        if not isinstance(state.size, tuple):
            return state.size, state.visits
    raise ValueError("perturbation_sizes needs a state with logpert's memory, got none. Train with logpert(memory=True).")


@method(
    target="logit", direction=(-1,), inference="regularised", granularity="sample",
    cite="taxonomy paper, section 5.1", off=dict(weight=1.0),
)  # fmt: skip
def logpert(
    *,
    weight: ArrayLike = 0.35,
    norm: Regulariser = "l1",
    inference: Literal["exact", "acs", "joint"] = "exact",
    step_size: ArrayLike | None = None,
    num_steps: int = 1,
    decay: ArrayLike = 0.9,
    milestones: tuple[float, ...] = (),
    memory: bool = False,
) -> Perturbation:
    """LogPert: lowers the losses of samples that don't fit their labels, by a sparse shift of each sample's own logits.

    Args:
      weight: λ > 0: labels are believed up to probability 1 − λ. The paper takes 0.175 or 0.35 for images, 0.75 or 1 for text (1 and
        more: plain training).
      norm: "l1" or "l2" (the squared norm, for comparison).
      inference: "exact" solves for v anew at every visit, for any number of samples. "acs" is the paper's alternate search: v_i is kept
        by sample and moved by `num_steps` proximal steps at every visit, before the network's own step. "joint" is the official code's:
        the network sees v_i of the last visit, then one SGD step on the batch's mean loss moves the table; its momentum is dense, so
        rows move on while their sample is not in the batch, and every class moves, not only the true one.
      step_size: "acs": κ on the sample's own loss (None: 2, the largest that never overshoots); "joint": the table's learning rate on
        the mean loss (None: 6, the official 60 times 0.1; the paper searches 1.5…12).
      num_steps: of "acs".
      decay: momentum of "joint".
      milestones: shares of training after which the step size of "joint" is divided by 10 (official: [0.5, 0.75], with the network's).
      memory: accumulate ‖v_i‖₁ by sample: see `perturbation_sizes`.

    The official code is logpert(weight=0.3, inference=joint, milestones=[0.5, 0.75]). Tables ("acs", "joint", memory) need
    num_examples and the batch's positions in the data set. With mixed targets "exact" moves the dominant class alone.

    Metrics: moved, the share of samples with v ≠ 0; size, the mean ‖v‖₁; inner_evaluations of the searches.
    """
    check_number("logpert", low=0, open_low=True, weight=weight, step_size=step_size)
    check_number("logpert", low=1, num_steps=num_steps)
    check_number("logpert", low=0, high=1, milestones=milestones)
    check_number("logpert", low=0, high=0.999, decay=decay)
    check_choice("logpert", "norm", norm, REGULARISERS)
    check_choice("logpert", "inference", inference, SEARCHES)
    for name, given, used_by in (
        ("step_size", step_size is not None, ("acs", "joint")), ("num_steps", num_steps != 1, ("acs",)),
        ("decay", not is_traced(decay) and not np.isclose(decay, 0.9), ("joint",)), ("milestones", milestones != (), ("joint",)),
    ):  # fmt: skip
        if given and inference not in used_by:
            raise ValueError(
                f"logpert uses {name} with inference={' or '.join(used_by)} only, got inference={inference}. Leave it out."
            )
    rate = STEP_SIZES[inference] if step_size is None else step_size

    def init(context: Context) -> LogPertState:
        table = lambda setting, shape=(), dtype=None: new_table("logpert", setting, context, shape, dtype)
        searched = f"inference={inference!r}"
        return LogPertState(
            delta=() if inference == "exact" else table(searched, (context.num_classes,)),
            momentum=table(searched, (context.num_classes,)) if inference == "joint" else (),
            size=table("memory=True") if memory else (),
            visits=table("memory=True", (), jnp.int32) if memory else (),
        )

    def apply(flow: Flow, rest: Rest, state: LogPertState, context: Context):
        if inference == "exact":
            own = jax.nn.one_hot(flow.labels, context.num_classes, dtype=flow.value.dtype)
            delta = _exact(flow.value, flow.targets, own, weight, norm)
        else:
            before = read("logpert", state.delta, flow.index).astype(flow.value.dtype)
            delta, state = (_alternate if inference == "acs" else _joint)(before, flow, rest, state, context)
        size = jnp.sum(jnp.abs(delta), axis=-1)
        if memory:
            seen = jnp.ones(size.shape, jnp.int32)
            state = state._replace(
                size=add(state.size, flow.index, size, axis_name=context.axis_name),
                visits=add(state.visits, flow.index, seen, axis_name=context.axis_name),
            )
        metrics = {"moved": jnp.mean((size > 0).astype(jnp.float32)), "size": jnp.mean(size)}
        if inference != "exact":
            metrics["inner_evaluations"] = jnp.int32(num_steps)
        return flow._replace(value=flow.value + delta), state, metrics

    def slope(delta: jax.Array, flow: Flow, rest: Rest) -> jax.Array:
        """∂ℓ/∂v [B, C] of each sample's own loss, by the links that follow as well (smoothing)."""
        u = jax.lax.stop_gradient(flow.value)
        return jax.lax.stop_gradient(jax.grad(lambda v: rest(u + v).sum())(delta))

    def _alternate(delta: jax.Array, flow: Flow, rest: Rest, state: LogPertState, context: Context):
        """Algorithm 1, lines 6 and 7: v_i first, then the network's step with it."""
        for _ in range(num_steps):
            delta = proximal_step(delta, slope(delta, flow, rest), weight=weight, step_size=rate, norm=norm)
        return delta, state._replace(delta=write(state.delta, flow.index, delta, axis_name=context.axis_name))

    def _joint(delta: jax.Array, flow: Flow, rest: Rest, state: LogPertState, context: Context):
        """One SGD step with dense momentum on mean(ℓ + λ·Reg(v)); the network sees v as it was."""
        pull = jnp.sign(delta) if norm == "l1" else 2 * delta
        gradient = slope(delta, flow, rest) + jnp.asarray(weight, delta.dtype) * pull
        batch = gather(flow.labels, context.axis_name).shape[0]
        momentum = jnp.asarray(decay, state.momentum.dtype) * state.momentum
        momentum = add(momentum, flow.index, gradient / batch, axis_name=context.axis_name)
        now = jnp.asarray(rate, momentum.dtype)
        for milestone in milestones:
            now = jnp.where(context.begun(milestone), now / 10, now)
        return delta, state._replace(delta=state.delta - now * momentum, momentum=momentum)

    tables = memory or inference != "exact"
    return Perturbation(
        "logits", init, apply, search=inference != "exact", needs=("index",) if tables else (), reads_labels=True
    )
