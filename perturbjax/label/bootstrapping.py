r"""Bootstrapping: moves the targets towards the model's own prediction, for noisy labels.

    Δy = λ (y′ − y),    y′ = p (soft) or onehot(argmax p) (hard), a constant for the gradient unless `through`

y′ is the current prediction (Reed et al.) or that of the sample's last visit, an epoch ago (taxonomy eq. 37): `previous`, which keeps
a table by sample. Source: Reed et al., ICLR 2015 workshop (β = 1 − λ); taxonomy eqs. 37–38.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method
from perturbjax.table import new_table, read, write

DEFAULT_WEIGHTS = {"soft": 0.05, "hard": 0.2}


def bootstrapped_targets(
    targets: jax.Array,
    log_probabilities: jax.Array,
    *,
    weight: ArrayLike,
    kind: Literal["soft", "hard"] = "soft",
    through: bool = False,
) -> jax.Array:
    """y + λ(y′ − y): [B, C], from targets y [B, C] and log p [B, C]; λ a number or [B]. through: the gradient flows into p.

    >>> print(bootstrapped_targets(jnp.array([[1.0, 0.0]]), jnp.log(jnp.array([[0.2, 0.8]])), weight=0.5, kind="hard"))
    [[0.5 0.5]]
    """
    check_choice("bootstrapped_targets", "kind", kind, DEFAULT_WEIGHTS)
    log_p = (log_probabilities if through else jax.lax.stop_gradient(log_probabilities)).astype(targets.dtype)
    own = jnp.exp(log_p) if kind == "soft" else jax.nn.one_hot(jnp.argmax(log_p, -1), log_p.shape[-1], dtype=log_p.dtype)
    weight = jnp.asarray(weight, targets.dtype)
    return targets + (weight[:, None] if weight.ndim else weight) * (own - targets)


class BootstrappingState(NamedTuple):
    """What `previous` remembers; () for each without it."""

    log_p: Any  # [N, C], of each sample's last visit
    visited: Any  # [N] bool


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Reed et al., ICLR 2015", off=dict(weight=0.0), alias="bootstrap",
)  # fmt: skip
def bootstrapping(
    *, kind: Literal["soft", "hard"] = "soft", weight: ArrayLike | None = None, previous: bool = False, through: bool = False
) -> Perturbation:
    """Bootstrapping: targets move towards the net's own prediction.

    Args:
      kind: "soft" or "hard". Hard bootstrapping with the current prediction lowers every loss; the others need not.
      weight: λ in [0, 1] (None: 0.05 soft, 0.2 hard).
      previous: take the prediction of the sample's last visit (the previous epoch) instead of the current one; at its first visit
        a sample keeps its target. Needs num_examples and the batch's positions in the data set.
      through: let the gradient flow into the soft target as well, as widespread code does (the soft bootstrapping of OLS's authors):
        the gradient of −Σ_c (y + λ(p − y))_c log p_c as a whole.
    """
    check_choice("bootstrapping", "kind", kind, DEFAULT_WEIGHTS)
    check_number("bootstrapping", low=0, high=1, weight=weight)
    if through and (kind == "hard" or previous):
        given = "kind='hard'" if kind == "hard" else "previous=True"
        raise ValueError(f"bootstrapping needs the current soft prediction for through=True, got {given}. Leave through out.")
    amount = DEFAULT_WEIGHTS[kind] if weight is None else weight

    def init(context: Context) -> Any:
        if not previous:
            return BootstrappingState((), ())
        table = lambda shape, dtype: new_table("bootstrapping", "previous=True", context, shape, dtype)
        return BootstrappingState(table((context.num_classes,), None), table((), bool))

    def apply(flow: Flow, rest: Rest, state: BootstrappingState, context: Context):
        log_p, weight = flow.trace["prediction"], amount
        if previous:
            now, axis_name = jax.lax.stop_gradient(log_p), context.axis_name
            known = read("bootstrapping", state.visited, flow.index)
            log_p = read("bootstrapping", state.log_p, flow.index)
            weight = jnp.where(known, jnp.asarray(amount, flow.value.dtype), 0)
            state = BootstrappingState(
                write(state.log_p, flow.index, now, axis_name=axis_name),
                write(state.visited, flow.index, jnp.ones_like(known), axis_name=axis_name),
            )
        targets = bootstrapped_targets(flow.value, log_p, weight=weight, kind=kind, through=through)
        return flow._replace(value=targets), state, {}

    return Perturbation("label", init, apply, needs=("index",) if previous else ())
