r"""Forward correction: the net predicts the true class, the loss compares with the class that the labels would then show.

    ℓ(Tᵀp, y),   Δ = Tᵀp − p on the prediction (taxonomy eq. 6-ii),   T_ij = probability that class i is labelled j, rows sum to 1

given       T itself, or symmetric noise T = (1 − r) I + (r/C) 11ᵀ, or pair noise T_ii = 1 − r, T_i,i+1 = r
estimated   row i of T is softmax(u) of the sample with the largest p_i, after training plainly for a while   (Patrini et al., eq. 12)
learned     rows of T are softmax(θ_i), θ descends the same loss as the net: a noise adaptation layer         (Goldberger & Ben-Reuven)

Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach", CVPR 2017; Goldberger &
Ben-Reuven, "Training deep neural-networks using a noise adaptation layer", ICLR 2017.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number, is_traced
from perturbjax.classes import gather
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method

KINDS = ("symmetric", "pair", "estimated", "learned")


def forward_corrected(log_probabilities: jax.Array, transition: jax.Array) -> jax.Array:
    """log(Tᵀp): [B, C], from log p [B, C] and T [C, C] whose row i says how class i is labelled.

    >>> T = jnp.array([[0.9, 0.1], [0.0, 1.0]])
    >>> print(jnp.exp(forward_corrected(jnp.log(jnp.array([[0.5, 0.5]])), T)))
    [[0.45 0.55]]
    """
    mixed = jnp.matmul(jnp.exp(log_probabilities), transition, precision=jax.lax.Precision.HIGHEST)
    # A class that nothing leads to: a loss as large as can be, and no nan in its gradient.
    return jnp.log(jnp.maximum(mixed, jnp.finfo(mixed.dtype).tiny))


def noise_matrix(kind: Literal["symmetric", "pair"], num_classes: int, rate: ArrayLike) -> jax.Array:
    """T: [C, C] of symmetric noise (a uniform label with probability `rate`, the true one included) or pair noise (the next class).

    >>> print(noise_matrix("pair", 3, 0.25))
    [[0.75 0.25 0.  ]
     [0.   0.75 0.25]
     [0.25 0.   0.75]]
    """
    check_choice("noise_matrix", "kind", kind, ("symmetric", "pair"))
    one, rate = jnp.eye(num_classes), jnp.asarray(rate, float)
    return (1 - rate) * one + rate * (jnp.full_like(one, 1 / num_classes) if kind == "symmetric" else jnp.roll(one, 1, axis=1))


class ForwardState(NamedTuple):
    """() for what the kind of transition doesn't need."""

    theta: Any  # [C, C], log T up to a constant per row (learned)
    transition: Any  # [C, C], T as of the last whole epoch of plain training (estimated)
    best: Any  # [C], the largest p_i since the epoch began
    rows: Any  # [C, C], the prediction there
    epoch: Any  # [] int32, the epoch that best and rows belong to


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="category",
    cite="Patrini et al., CVPR 2017", off=None, alias="forward",
)  # fmt: skip
def forward_correction(
    *,
    transition: Literal["symmetric", "pair", "estimated", "learned"] = "estimated",
    rate: ArrayLike = 0.2,
    matrix: ArrayLike | None = None,
    start: ArrayLike = 0.3,
    step_size: ArrayLike = 0.1,
) -> Perturbation:
    """Forward correction: predictions pass through a matrix of label noise, given, estimated or learned, before the loss.

    Args:
      transition: "symmetric" or "pair" noise of a known rate, "estimated" after a warm-up, or "learned" with the net.
      rate: of symmetric and pair noise, and where "learned" starts from (symmetric).
      matrix: T [C, C] itself, rows that sum to 1; then `transition` is not looked at.
      start: "estimated": share of training that is plain; T comes from its last whole epoch (before one is over, the identity).
      step_size: "learned": the learning rate of θ, by plain SGD on the mean loss.

    Metrics: kept, the mean of T's diagonal.
    """
    check_choice("forward_correction", "transition", transition, KINDS)
    check_number("forward_correction", low=0, high=1, rate=rate, start=start)
    check_number("forward_correction", low=0, step_size=step_size)
    kind = "given" if matrix is not None else transition
    if kind == "learned":
        check_number("forward_correction", low=0, open_low=True, rate=rate)
    if kind == "given" and not is_traced(matrix):
        _check_matrix(matrix)

    def init(context: Context) -> ForwardState:
        c = context.num_classes
        if kind == "given" and np.shape(matrix) != (c, c):
            raise ValueError(
                f"forward_correction needs matrix [{c}, {c}], got {np.shape(matrix)}. Give one row per true class."
            )
        theta = jnp.log(noise_matrix("symmetric", c, rate)) if kind == "learned" else ()
        if kind != "estimated":
            return ForwardState(theta, (), (), (), ())
        return ForwardState((), jnp.eye(c), jnp.zeros([c]), jnp.eye(c), jnp.int32(0))

    def apply(flow: Flow, rest: Rest, state: ForwardState, context: Context):
        log_p = flow.value
        through = lambda t: forward_corrected(log_p, t.astype(log_p.dtype))
        if kind == "estimated":
            plain = ~context.begun(start)
            state = _estimate(state, jax.lax.stop_gradient(log_p), plain, context)
            t, value = state.transition, jnp.where(plain, log_p, through(state.transition))
        elif kind == "learned":
            t = jax.nn.softmax(state.theta, axis=-1)
            value = through(t)
            state = state._replace(theta=_descend(state.theta, jax.lax.stop_gradient(log_p), flow, rest, context))
        else:
            t = jnp.asarray(matrix, float) if kind == "given" else noise_matrix(kind, context.num_classes, rate)
            value = through(t)
        return flow._replace(value=value), state, {"kept": jnp.mean(jnp.diagonal(t))}

    def _estimate(state: ForwardState, log_p: jax.Array, plain: jax.Array, context: Context) -> ForwardState:
        """Takes in a batch of the plain phase; T is replaced when an epoch that was plain throughout is over."""
        p = gather(jnp.exp(log_p), context.axis_name).astype(state.rows.dtype)
        epoch = jnp.asarray(context.epoch, jnp.int32)
        new = epoch != state.epoch
        transition = jnp.where((new & (state.best > 0))[:, None], state.rows, state.transition)
        best, top = jnp.where(new, 0, state.best), jnp.max(p, axis=0)
        rows = jnp.where((top > best)[:, None], p[jnp.argmax(p, axis=0)], state.rows)
        # After the plain phase nothing is kept: an epoch that it ended in does not count.
        return ForwardState((), transition, jnp.where(plain, jnp.maximum(best, top), 0), rows, epoch)

    def _descend(theta: jax.Array, log_p: jax.Array, flow: Flow, rest: Rest, context: Context) -> jax.Array:
        def loss(theta):
            t = jax.nn.softmax(theta, axis=-1).astype(log_p.dtype)
            return jnp.mean(flow.weights.astype(log_p.dtype) * rest(forward_corrected(log_p, t)))

        slope = jax.lax.stop_gradient(jax.grad(loss)(theta))
        if context.axis_name is not None:
            slope = jax.lax.pmean(slope, context.axis_name)
        return theta - jnp.asarray(step_size, theta.dtype) * slope

    return Perturbation("prediction", init, apply)


def _check_matrix(matrix: Any) -> None:
    found = np.asarray(matrix, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        wrong = f"shape {found.shape}"
    elif not (found >= 0).all():
        wrong = f"the entry {found[~(found >= 0)][0]:g}"
    elif np.abs(found.sum(1) - 1).max() > 1e-4:
        wrong = f"rows that sum to {found.sum(1).round(4).tolist()}"
    else:
        return
    raise ValueError(
        f"forward_correction needs matrix [C, C] with entries >= 0 and rows that sum to 1, got {wrong}. "
        "Row i says how class i is labelled: matrix=[[0.9, 0.1], [0.2, 0.8]]."
    )
