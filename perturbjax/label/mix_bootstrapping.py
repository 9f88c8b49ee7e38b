r"""mixBootstrapping: targets move towards the class's mean prediction of the last epoch and the sample's own present one.

    y + α (β p̃_y + (1 − β) p − y),    p̃_c = Σ_{j: y_j = c} conf_j p_j / Σ_{j: y_j = c} conf_j   over the previous epoch

conf ≡ 1, or 1 where the prediction was right and 0 elsewhere. β = 0 is soft bootstrapping; β = 1 with the second kind is online label
smoothing. The predictions are constants for the gradient; a class without weight keeps y in place of p̃.
Source: taxonomy paper, section 6.5, extension (3), eqs. 67–69; its granularity is mixed, eq. 44.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import RunningMean, running_mean_init, running_mean_update
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def mix_bootstrapped(
    targets: jax.Array, log_probabilities: jax.Array, class_prediction: jax.Array, *, weight: ArrayLike, beta: ArrayLike
) -> jax.Array:
    """y + α(β p̃_y + (1 − β) p − y): [B, C], all three arguments [B, C].

    >>> y, p = jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.4]])
    >>> print(mix_bootstrapped(y, jnp.log(p), jnp.array([[0.8, 0.2]]), weight=0.5, beta=0.5))
    [[0.85 0.15]]
    """
    p = jnp.exp(jax.lax.stop_gradient(log_probabilities)).astype(targets.dtype)
    beta = jnp.asarray(beta, targets.dtype)
    own = beta * class_prediction.astype(targets.dtype) + (1 - beta) * p
    return targets + jnp.asarray(weight, targets.dtype) * (own - targets)


@method(
    target="label", direction=(+1, -1), inference="prior", granularity=("sample", "category"),
    cite="taxonomy paper, section 6.5", off=dict(weight=0.0), alias="mixbootstrap",
)  # fmt: skip
def mix_bootstrapping(
    *, weight: ArrayLike = 0.2, beta: ArrayLike = 0.5, confidence: Literal["one", "right"] = "right"
) -> Perturbation:
    """mixBootstrapping: targets move by α = `weight` towards β · class mean prediction + (1 − β) · own prediction.

    Args:
      weight, beta: α and β in [0, 1]; the paper names no values.
      confidence: which predictions make up the class's mean: "one", all of them; "right", those that were right (eq. 69).
    """
    check_number("mix_bootstrapping", low=0, high=1, weight=weight, beta=beta)
    check_choice("mix_bootstrapping", "confidence", confidence, ("one", "right"))

    def init(context: Context) -> RunningMean:
        return running_mean_init(context.num_classes, (context.num_classes,), dtype=context.dtype)

    def apply(flow: Flow, rest: Rest, state: RunningMean, context: Context):
        log_p = jax.lax.stop_gradient(flow.trace["prediction"])
        right = jnp.argmax(log_p, axis=-1).astype(flow.labels.dtype) == flow.labels
        state = running_mean_update(
            state, jnp.exp(log_p), jnp.where(right | (confidence == "one"), flow.labels, -1), update="epoch", epoch=context.epoch,
            axis_name=context.axis_name,
        )  # fmt: skip
        of_class = state.mean[flow.labels].astype(flow.value.dtype)
        of_class = jnp.where(state.seen[flow.labels][:, None], of_class, flow.value)
        targets = mix_bootstrapped(flow.value, log_p, of_class, weight=weight, beta=beta)
        return flow._replace(value=targets), state, {}

    return Perturbation("label", init, apply)
