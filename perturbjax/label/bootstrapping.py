r"""Bootstrapping: moves the targets towards the model's own prediction, for noisy labels.

    Δy = λ (y′ − y),    y′ = p (soft) or onehot(argmax p) (hard), the current prediction, a constant for the gradient

Source: Reed et al., ICLR 2015 workshop (β = 1 − λ); taxonomy eqs. 37–38, which take y′ from the previous epoch.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_choice, check_number
from perturbjax.core import Context, Flow, Perturbation, Rest, method

DEFAULT_WEIGHTS = {"soft": 0.05, "hard": 0.2}


def bootstrapped_targets(
    targets: jax.Array, log_probabilities: jax.Array, *, weight: ArrayLike, kind: Literal["soft", "hard"] = "soft"
) -> jax.Array:
    """y + λ(y′ − y): [B, C], from targets y [B, C] and log p [B, C].

    >>> print(bootstrapped_targets(jnp.array([[1.0, 0.0]]), jnp.log(jnp.array([[0.2, 0.8]])), weight=0.5, kind="hard"))
    [[0.5 0.5]]
    """
    log_p = jax.lax.stop_gradient(log_probabilities).astype(targets.dtype)
    own = jnp.exp(log_p) if kind == "soft" else jax.nn.one_hot(jnp.argmax(log_p, -1), log_p.shape[-1], dtype=log_p.dtype)
    return targets + jnp.asarray(weight, targets.dtype) * (own - targets)


@method(
    target="label", direction=(+1, -1), inference="prior", granularity="sample",
    cite="Reed et al., ICLR 2015", off=dict(weight=0.0), alias="bootstrap",
)  # fmt: skip
def bootstrapping(*, kind: Literal["soft", "hard"] = "soft", weight: ArrayLike | None = None) -> Perturbation:
    """Bootstrapping of one `kind`, "soft" or "hard", with λ = `weight` in [0, 1] (None: 0.05 soft, 0.2 hard).

    Hard bootstrapping lowers every loss; the soft one need not.
    """
    check_choice("bootstrapping", "kind", kind, DEFAULT_WEIGHTS)
    check_number("bootstrapping", low=0, high=1, weight=weight)
    amount = DEFAULT_WEIGHTS[kind] if weight is None else weight

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        targets = bootstrapped_targets(flow.value, flow.trace["prediction"], weight=amount, kind=kind)
        return flow._replace(value=targets), state, {}

    return Perturbation("label", lambda context: (), apply)
