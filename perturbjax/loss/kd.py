r"""Knowledge distillation (KD): the prediction is also compared with a teacher's, both softened by a temperature.

    form="mixture"        (1 − λ) · ℓ + λ T² · KL(q ‖ p′),       q = softmax(z/T),  p′ = softmax(u/T)           (Hinton et al.)
    form="perturbation"   ℓ + λ [CE(p, q) − CE(p, p′)],          p′ constant for the gradient                   (taxonomy eq. 15)

z are the teacher's logits for the same (perturbed) inputs. The gradient of the second form is (p − ŷ) + λ(p′ − q), that of
ℓ + (λ/T) T² KL(q ‖ p′). Table 1 puts KD in the row "loss", section 4.2.2 of the taxonomy calls it a label perturbation.
Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; taxonomy eqs. 14–15; the teacher without a
net: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.loss.teacher import VIRTUAL, Teacher, check_teacher, teacher_logits, teacher_variables
from perturbjax.method import method


class KDState(NamedTuple):
    """What the next step needs."""

    teacher: Any  # the teacher's variables, which never change; () for the virtual one


def distillation_losses(logits: jax.Array, teacher: jax.Array, *, temperature: ArrayLike = 4.0) -> jax.Array:
    """KL(q ‖ p′) of the softened predictions: [B], from the student's and the teacher's logits [B, C], whose gradient is stopped.

    >>> print(distillation_losses(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), temperature=1.0).round(3))
    [0.462]
    """
    t = jnp.asarray(temperature, logits.dtype)
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(logits.dtype) / t)
    return jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(logits / t)), axis=-1)


def perturbation_of_kd(log_probabilities: jax.Array, logits: jax.Array, teacher: jax.Array, *, temperature: ArrayLike = 4.0):
    """CE(p, q) − CE(p, p′) with p′ constant: [B] (taxonomy eq. 15)."""
    t = jnp.asarray(temperature, logits.dtype)
    q = jax.nn.softmax(jax.lax.stop_gradient(teacher).astype(logits.dtype) / t)
    own = jax.nn.softmax(jax.lax.stop_gradient(logits) / t)
    return jnp.sum((own - q) * log_probabilities, axis=-1)


@method(
    target="loss", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Hinton et al., 2015", off=dict(weight=0.0),
)  # fmt: skip
def kd(
    *, teacher: str | Teacher = VIRTUAL, weight: ArrayLike = 0.5, temperature: ArrayLike = 4.0,
    form: Literal["mixture", "perturbation"] = "mixture",
) -> tuple[Perturbation, ...]:  # fmt: skip
    """Knowledge distillation from the net of a run, teacher="FOLDER"; without one, from a virtual teacher that is 90 % sure.

    Args:
      teacher: the folder of a run (in quotes), a `Teacher` of your own, or "virtual": 0.9 for the label, the rest for all others alike.
      weight: λ. temperature: T. form: see the equations.

    Metrics: teacher_accuracy on the training labels, distance (the KL divergence, without T²).
    """
    check_teacher("kd", teacher)
    check_choice("kd", "form", form, ("mixture", "perturbation"))
    check_number("kd", low=0, high=1 if form == "mixture" else jnp.inf, weight=weight)
    check_number("kd", low=0, open_low=True, temperature=temperature)
    place = f"kd {teacher if isinstance(teacher, str) else id(teacher)}"  # in flow.extra: the teacher's logits

    def init(context: Context) -> KDState:
        return KDState(teacher_variables("kd", teacher, context.site_shapes["input"], context.num_classes))

    def ask(flow: Flow, rest: Rest, state: KDState, context: Context):
        # At the logits already, so that links that search from there on don't ask again and again.
        found = jax.lax.stop_gradient(teacher_logits(teacher, state.teacher, flow.trace["input"], flow.targets))
        return flow._replace(extra={**flow.extra, place: found}), state, {}

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        u, z = flow.trace["logits"], flow.extra[place]
        amount, distance = jnp.asarray(weight, u.dtype), distillation_losses(u, z, temperature=temperature)
        if form == "mixture":
            losses = (1 - amount) * flow.value + amount * jnp.asarray(temperature, u.dtype) ** 2 * distance
        else:
            losses = flow.value + amount * perturbation_of_kd(flow.trace["prediction"], u, z, temperature=temperature)
        right = jnp.mean((jnp.argmax(z, axis=-1).astype(jnp.int32) == flow.labels.astype(jnp.int32)).astype(jnp.float32))
        return flow._replace(value=losses), state, {"teacher_accuracy": right, "distance": distance.mean()}

    return Perturbation("logits", init, ask), Perturbation("loss", lambda context: (), apply)
