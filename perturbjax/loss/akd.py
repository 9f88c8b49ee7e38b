r"""Adversarial knowledge distillation (AKD): also learns from a teacher where the two disagree most around each sample.

    δ_i = argmax_{‖δ‖ ≤ ε} KL(q(x_i + δ) ‖ p(x_i + δ)) by projected gradient steps;     loss ℓ(x_i) + λ · KL at x_i + δ_i

q and p are the teacher's and the student's predictions, softened by T. In the original a generator makes the inputs, without data; the
ball around the training samples stands for it here (our reading). Source: Choi et al., "Data-Free Network Quantization With
Adversarial Knowledge Distillation", CVPR Workshops 2020; taxonomy Table 1.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.feature.adversarial import Step, check_ball, pixel_range, random_start, require_floats, site_shape
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.loss.kd import KDState
from perturbjax.loss.teacher import VIRTUAL, Teacher, check_teacher, teacher_logits, teacher_variables
from perturbjax.method import method
from perturbjax.projection import Norm


@method(
    target="loss", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Choi et al., CVPR Workshops 2020", off=dict(weight=0.0),
)  # fmt: skip
def akd(
    *,
    teacher: str | Teacher = VIRTUAL,
    weight: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    bound: ArrayLike = 8 / 255,
    step_size: ArrayLike = 2 / 255,
    num_steps: int = 7,
    norm: Norm = "linf",
    step: Step = "sign",
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Perturbation:
    """Adversarial distillation: adds the divergence from a teacher, teacher="FOLDER" of a run, at its worst within a ball around each input.

    Args:
      teacher: the folder of a run (in quotes), a `Teacher` of your own, or "virtual": 0.9 for the label, the rest for all others alike.
        On texts, whose words' vectors are moved, a `Teacher` takes these, and a run can't be one.
      weight: λ. temperature: T.
      bound, step_size, num_steps, norm, step, value_range: of the search, as in `adversarial_training`.

    Metrics: divergence, inner_evaluations (the search's steps, and the pass at the point that it finds).
    """
    check_teacher("akd", teacher)
    check_number("akd", low=0, weight=weight, num_steps=num_steps)
    check_number("akd", low=0, open_low=True, temperature=temperature)
    check_ball("akd", norm=norm, step=step, value_range=value_range, bound=bound, step_size=step_size)

    def init(context: Context) -> KDState:
        site_shape("akd", context, norm=norm, value_range=value_range, bound=bound)
        shape = context.site_shapes[context.site]
        if context.site != "input" and teacher != VIRTUAL and not isinstance(teacher, Teacher):
            raise ValueError(
                f"akd needs a teacher of the values at {context.site!r}, where the inputs are moved (texts are whole numbers), got the run "
                f"{str(teacher)!r}, which reads texts. Write kd(teacher={str(teacher)!r}), or give a Teacher of vectors {shape}."
            )
        return KDState(teacher_variables("akd", teacher, shape, context.num_classes))

    def apply(flow: Flow, rest: Rest, state: KDState, context: Context):
        require_floats("akd", flow.value, "input")

        def divergence(value: jax.Array) -> jax.Array:
            """KL(q ‖ p) [B]; unlike in `kd`, the teacher follows the input."""
            u = rest.flow(value)[1].trace["logits"]
            z = teacher_logits(teacher, state.teacher, value, flow.targets).astype(u.dtype)
            t = jnp.asarray(temperature, u.dtype)
            log_q, log_p = jax.nn.log_softmax(z / t), jax.nn.log_softmax(u / t)
            return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)

        count, shape = flow.labels.shape[0], flow.value.shape[1:]
        start = random_start(context.key, flow.index, shape, bound=bound, norm=norm)
        delta, _ = pgd(
            divergence, flow.value, None, count, step_size=step_size, num_steps=num_steps, bound=bound, step=step, norm=norm,
            start=start, value_range=pixel_range(value_range, context), axis_name=context.axis_name,
        )  # fmt: skip
        found = divergence(flow.value + delta)
        added = jnp.where(flow.weights != 0, jnp.asarray(weight, found.dtype) * found, 0)  # padding has no teacher
        metrics = {"divergence": found.mean(), "inner_evaluations": jnp.int32(num_steps + 1)}
        return flow._replace(penalty=flow.penalty + added.astype(flow.penalty.dtype)), state, metrics

    return Perturbation("input", init, apply, search=True)
