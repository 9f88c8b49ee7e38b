r"""DLB, self-distillation from the last mini-batch: the last batch is looked at again, and should look as it did then.

    ½ mean CE(new batch) + ½ mean CE(last batch) + α T² · mean KL( softmax(u_then/T) ‖ softmax(u_now/T) )   over the last batch

u_then are its logits when it was new, one step ago. Two passes a step, as in the authors' code: twice the cost of plain training. The
last batch is shown as it was augmented then (view="same") or, as in the authors' code, augmented anew (view="new"), which is the trainer's
business: it draws both views when the batch is new. Of texts the words are kept; they have one view, and differ by the model's dropout.
Source: Shen et al., "Self-Distillation from the Last Mini-Batch for Consistency Regularization", CVPR 2022.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.classes import gather, own_share
from perturbjax.link import Context, Flow, Perturbation, Rest, clean_logits
from perturbjax.loss.kd import distillation_losses
from perturbjax.method import method

_TARGETS = "dlb targets"  # in flow.extra of the second pass: its [B, C] before what acts on labels, mixed where inputs were
_LAST = "dlb"  # in flow.extra: (logits of the last batch now [B, C], the clean ones, the Last as this device has it)


class Last(NamedTuple):
    """The last batch, of all devices."""

    inputs: jax.Array  # [B, ...], floating; words of texts are whole numbers far below 2²⁴, which float32 keeps exactly
    labels: jax.Array  # [B] int32
    targets: jax.Array  # [B, C]
    weights: jax.Array  # [B]
    index: jax.Array  # [B] int32
    there: jax.Array  # [] bool, whether there has been one


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Shen et al., CVPR 2022", off=None, asks=lambda settings: {"second_view": True} if settings["view"] == "new" else {},
)  # fmt: skip
def dlb(
    *, weight: ArrayLike = 1.0, temperature: ArrayLike = 3.0, view: Literal["same", "new"] = "same"
) -> tuple[Perturbation, ...]:
    """DLB: trains on each batch twice, the second time also on the predictions of the first time (twice the cost).

    Args:
      weight: α; the authors' code has no default.
      temperature: T.
      view: of the last batch: "same", as it was, mixing before this link included; "new", augmented anew, as in the authors' code, with
        the samples' own labels. The batch then needs side["second_view"], [B, ...] like the inputs, which the trainer draws.

    Links of the label and the loss act on the new batch alone, as do searches; all others up to the logits act on both batches, each
    with its own labels. The distillation compares the logits without what searches and links that know the label put in.
    Metrics: distillation, the mean T²·KL; inner_evaluations of the second pass.
    """
    check_number("dlb", low=0, weight=weight)
    check_number("dlb", low=0, open_low=True, temperature=temperature)
    check_choice("dlb", "view", view, ("same", "new"))

    def init_inputs(context: Context) -> Last:
        shape = context.site_shapes["input"]
        count, numbers = shape[0], jnp.zeros(shape[0], jnp.int32)
        targets = jnp.zeros((count, context.num_classes), float)
        return Last(jnp.zeros(shape, float), numbers, targets, jnp.zeros(count, float), numbers, jnp.bool_(False))

    def look_again(flow: Flow, rest: Rest, state: Last, context: Context):
        last = Last(*(own_share(x, context.axis_name) if x.ndim else x for x in state))
        # With the last batch's own labels, which links at the logits may know; what others left in `extra` is about the new one.
        _, end = rest.flow(
            last.inputs.astype(flow.value.dtype), labels=last.labels.astype(flow.labels.dtype),
            targets=last.targets.astype(flow.targets.dtype), index=last.index.astype(flow.index.dtype), extra={},
        )  # fmt: skip
        last = last._replace(targets=end.extra[_TARGETS])
        now = end.trace["logits"], clean_logits(end, end.trace["logits"]), last
        again, targets = flow.value, flow.targets
        if view == "new":
            again, targets = second_view(flow), jax.nn.one_hot(flow.labels, context.num_classes, dtype=flow.targets.dtype)
        kept = lambda new, old: gather(jax.lax.stop_gradient(new), context.axis_name).astype(old.dtype)
        state = Last(
            kept(again, state.inputs), kept(flow.labels, state.labels), kept(targets, state.targets),
            kept(flow.weights, state.weights), kept(flow.index, state.index), jnp.ones_like(state.there),
        )  # fmt: skip
        # A pass that trains the network: three units of work, where an inner evaluation has two.
        return flow._replace(extra={**flow.extra, _LAST: now}), state, {"inner_evaluations": jnp.float32(1.5)}

    def init_logits(context: Context) -> jax.Array:
        return jnp.zeros((context.batch_size, context.num_classes), float)

    def compare(flow: Flow, rest: Rest, state: jax.Array, context: Context):
        if _LAST not in flow.extra:  # inside the second pass, or another link's search
            return flow._replace(extra={**flow.extra, _TARGETS: flow.targets}), state, {}
        logits, now, (_, _, targets, weights, _, there) = flow.extra[_LAST]
        then = own_share(state, context.axis_name).astype(now.dtype)
        t = jnp.asarray(temperature, now.dtype)
        taught = t**2 * distillation_losses(now, then, temperature=t)
        cross_entropy = -jnp.sum(targets.astype(now.dtype) * jax.nn.log_softmax(logits), axis=-1)
        paid = weights.astype(now.dtype) * (cross_entropy / 2 + jnp.asarray(weight, now.dtype) * taught)
        clean = clean_logits(flow, flow.trace["logits"])  # searches and labels are not the same in both passes
        state = gather(jax.lax.stop_gradient(clean), context.axis_name).astype(state.dtype)
        flow = flow._replace(
            penalty=flow.penalty + jnp.where(there, paid, 0).astype(flow.penalty.dtype),
            weights=flow.weights * jnp.where(there, 0.5, 1.0).astype(flow.weights.dtype),
        )
        return flow, state, {"distillation": jnp.where(there, jnp.mean(taught), 0)}

    return Perturbation("raw_input", init_inputs, look_again, search=True), Perturbation("prediction", init_logits, compare)


def second_view(flow: Flow) -> jax.Array:
    """The batch augmented once more, [B, ...]. Raises ValueError if nobody did it."""
    found = flow.side.get("second_view")
    if found is None or found.shape != flow.value.shape:
        raise ValueError(
            f"dlb needs side['second_view'] {flow.value.shape} for view='new', got {'none' if found is None else found.shape}. Write "
            "Recipe(..., second_view=True) for the trainer, pj.batch(x, y, side={'second_view': other}) for batches of your own, or view='same'."
        )
    return found
