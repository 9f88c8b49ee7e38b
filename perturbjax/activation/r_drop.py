r"""R-Drop: two passes with different dropout masks, whose predictions p and q should agree.

    ℓ = CE(p, y) + CE(q, y) + α · ½ (KL(p‖q) + KL(q‖p)),        ½ (KL(p‖q) + KL(q‖p)) = ½ Σ_c (p_c − q_c)(log p_c − log q_c)

The masks are those of the model's own dropout and of the links from R-Drop's site on (`dropout`, `dropblock`): without any, both passes
are one and R-Drop does nothing. As a perturbation the second pass is the first one with other activations. It costs one more pass,
twice plain training. BatchNorm keeps the statistics of the first pass.
Source: Wu et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021, eq. 4; the authors' code.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method

_OTHER = "r_drop"  # in flow.extra: the logits [B, C] of the second pass


def symmetric_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
    """½ (KL(p‖q) + KL(q‖p)) [B] of the softmax of both [B, C]; differentiable in both.

    >>> print(symmetric_divergence(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]])).round(3))
    [0.381]
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other.astype(logits.dtype))
    return 0.5 * jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)


@method(
    target="activation", direction=(+1,), inference="prior", granularity="sample",
    cite="Wu et al., NeurIPS 2021", off=None,
)  # fmt: skip
def r_drop(*, alpha: ArrayLike = 0.6, ce: Literal["sum", "mean"] = "sum", site: str = "input") -> tuple[Perturbation, ...]:
    """R-Drop: trains on two passes with different masks and on their agreement (twice the cost).

    Args:
      alpha: α; 0.6 for images, 1 to 5 for texts.
      ce: "sum" of both cross entropies, as in the paper, or their "mean", as in the authors' example code; α is the same in both.
      site: where the second pass starts; dropout before it is the same in both passes.

    Links that stand before it in the chain and act at its site or earlier act once, for both passes: write "mixup, r_drop". What others
    add as a penalty comes from the first pass alone. Metrics: divergence; inner_evaluations of the second pass.
    """
    check_number("r_drop", low=0, alpha=alpha)
    check_choice("r_drop", "ce", ce, ("sum", "mean"))
    share = 1.0 if ce == "sum" else 0.5

    def second_pass(flow: Flow, rest: Rest, state: tuple, context: Context):
        losses, end = rest.flow(flow.value, key=jax.random.fold_in(context.key, 0))
        paid = share * end.weights.astype(losses.dtype) * losses
        flow = flow._replace(
            extra={**flow.extra, _OTHER: end.trace["logits"]},
            penalty=flow.penalty + paid.astype(flow.penalty.dtype),
            weights=share * flow.weights,
        )
        # A pass that trains the network: three units of work, where an inner evaluation has two.
        return flow, state, {"inner_evaluations": jnp.float32(1.5)}

    def compare(flow: Flow, rest: Rest, state: tuple, context: Context):
        if _OTHER not in flow.extra:  # inside the second pass, or an earlier link's search
            return flow, state, {}
        divergence = symmetric_divergence(flow.trace["logits"], flow.extra[_OTHER])
        added = jnp.asarray(alpha, divergence.dtype) / share * divergence  # weighted with the loss: the share is in the weights
        flow = flow._replace(value=flow.value + added.astype(flow.value.dtype))
        return flow, state, {"divergence": divergence.mean()}

    none = lambda context: ()
    return Perturbation(site, none, second_pass, search=True), Perturbation("loss", none, compare)
