r"""Online label smoothing (OLS): smooths each target towards what the net itself said about its class, where it was right.

    y + λ (S_y − y),    S_c = mean of softmax(u) over the samples of class c that were classified rightly in the previous epoch

λ = ½ is the authors' ½ CE(p, y) + ½ CE(p, S_y). S comes from the training passes, as in their code, which has S = 0 in the first epoch
(half the loss) and 1/C for a class without a hit in the last one: missing="code". Otherwise such a class keeps y, or its last S, so
that targets stay probabilities.
Source: Zhang et al., "Delving Deep into Label Smoothing", IEEE TIP 2021.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import RunningMean, running_mean_init, running_mean_update
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def smoothed_online(
    targets: jax.Array, labels: jax.Array, soft: jax.Array, known: jax.Array, *, weight: ArrayLike
) -> jax.Array:
    """y + λ(S_y − y): [B, C], from targets [B, C], labels [B], S [C, C] and which of its rows are known [C] (others keep y).

    >>> S = jnp.array([[0.8, 0.2], [0.0, 0.0]])
    >>> print(smoothed_online(jnp.eye(2), jnp.array([0, 1]), S, jnp.array([True, False]), weight=0.5))
    [[0.9 0.1]
     [0.  1. ]]
    """
    step = jnp.asarray(weight, targets.dtype) * (soft[labels].astype(targets.dtype) - targets)
    return targets + jnp.where(known[labels][:, None], step, 0)


class CodeState(NamedTuple):
    """What missing="code" remembers."""

    means: RunningMean  # [C, C]
    hit: jax.Array  # [C] bool, classes with a right prediction in the epoch before
    begun: jax.Array  # [] bool, whether there has been a step
    finished: jax.Array  # [] bool, whether an epoch is over


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="category",
    cite="Zhang et al., IEEE TIP 2021", off=dict(weight=0.0), alias="ols",
)  # fmt: skip
def online_label_smoothing(*, weight: ArrayLike = 0.5, missing: Literal["keep", "code"] = "keep") -> Perturbation:
    """Online label smoothing: targets move towards the mean prediction of their class in the last epoch, with λ = `weight` in [0, 1].

    missing: S_c of a class without a right prediction in the last epoch: "keep" its last one, or y before it has any; "code": 0 in the
      first epoch, 1/C later (the authors' code).
    """
    check_number("online_label_smoothing", low=0, high=1, weight=weight)
    check_choice("online_label_smoothing", "missing", missing, ("keep", "code"))

    def init(context: Context) -> RunningMean | CodeState:
        means = running_mean_init(context.num_classes, (context.num_classes,), dtype=context.dtype)
        none = jnp.zeros([], bool)
        return means if missing == "keep" else CodeState(means, jnp.zeros_like(means.seen), none, none)

    def apply(flow: Flow, rest: Rest, state: RunningMean | CodeState, context: Context):
        means = state.means if isinstance(state, CodeState) else state
        log_p = jax.lax.stop_gradient(flow.trace["prediction"])
        right = jnp.argmax(log_p, axis=-1).astype(flow.labels.dtype) == flow.labels
        after = running_mean_update(
            means, jnp.exp(log_p), jnp.where(right, flow.labels, -1), update="epoch", epoch=context.epoch,
            axis_name=context.axis_name,
        )  # fmt: skip
        if not isinstance(state, CodeState):
            return flow._replace(value=smoothed(flow, after.mean, after.seen)), after, {}
        over = state.begun & (after.epoch != means.epoch)
        hit, finished = jnp.where(over, means.count > 0, state.hit), state.finished | over
        soft = jnp.where(hit[:, None], after.mean, 1 / context.num_classes)
        soft = jnp.where(finished, soft, 0)
        return (
            flow._replace(value=smoothed(flow, soft, jnp.ones_like(hit))),
            CodeState(after, hit, jnp.bool_(True), finished),
            {},
        )

    def smoothed(flow: Flow, soft: jax.Array, known: jax.Array) -> jax.Array:
        return smoothed_online(flow.value, flow.labels, soft, known, weight=weight)

    return Perturbation("label", init, apply)
