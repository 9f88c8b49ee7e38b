r"""ν-SVM: a hinge whose margin ρ is learned, one number for the corpus, so that a share ν of the samples falls short of it.

    −ν ρ + mean_i max(0, ρ − m_i),   m_i = (u_y − max_{j≠y} u_j)/s,   ρ ← ρ − κ (share of m_i < ρ − ν)

The step is the gradient's; ρ rests at the ν-quantile of the margins, so that the loss is −ν times the mean of the worst share ν. It
would fall without end as the logits grow: they are measured in units of the head and of the features, s² = mean_c ‖w_c‖² · mean_i ‖a_i‖²,
through which the gradient flows. ρ ≥ 0 of the original holds at every solution but u = 0 and isn't enforced on the way: a net begins with
negative margins, and ρ = 0 would hold it at u = 0. Source: Schölkopf et al., "New Support Vector Algorithms", Neural Computation 2000
(two classes, as a quadratic program; the several classes and the steps are our reading).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.loss.svm import margins
from perturbjax.method import method


class NuSVMState(NamedTuple):
    """What the next step needs."""

    rho: jax.Array  # [], the margin ρ


def nu_svm_losses(margin: jax.Array, *, rho: ArrayLike, nu: ArrayLike = 0.5) -> jax.Array:
    """max(0, ρ − m) − νρ: like the margins m.

    >>> print(nu_svm_losses(jnp.array([0.0, 3.0]), rho=2.0, nu=0.5))
    [ 1. -1.]
    """
    rho = jnp.asarray(rho, margin.dtype)
    return jnp.maximum(0, rho - margin) - jnp.asarray(nu, margin.dtype) * rho


@method(
    target="loss", direction=(+1, -1), inference="hyper-parameter", granularity="corpus",
    cite="Schölkopf et al., Neural Computation 2000", off=None,
)  # fmt: skip
def nu_svm(*, nu: ArrayLike = 0.5, step_size: ArrayLike = 0.1, normalize: bool = True) -> Perturbation:
    """ν-SVM: the hinge loss with one margin for all samples, learned so that a share `nu` of them falls short of it.

    Replaces the loss so far, so it comes before the other links of the loss; mixed targets take the mean over their classes.

    Args:
      nu: ν in (0, 1]; more than the share of wrong labels. step_size: κ of the margin's own gradient steps.
      normalize: measure margins in units of the head's rows and of the features, which the model must have then; not needed with
        head="cosine".

    Metrics: rho; short, the share of margins below ρ.
    """
    check_number("nu_svm", low=0, high=1, open_low=True, nu=nu)
    check_number("nu_svm", low=0, step_size=step_size)

    def average(x: jax.Array, context: Context) -> jax.Array:
        return x.mean() if context.axis_name is None else jax.lax.pmean(x.mean(), context.axis_name)

    def init(context: Context) -> NuSVMState:
        return NuSVMState(jnp.zeros([], context.dtype))

    def apply(flow: Flow, rest: Rest, state: NuSVMState, context: Context):
        margin = margins(flow.trace["logits"])
        if normalize:
            rows, features = wide(context.head()[0]), wide(flow.trace["features"])
            square = jnp.mean(jnp.sum(rows**2, axis=-1)) * average(jnp.sum(features**2, axis=-1), context)
            margin = margin * jax.lax.rsqrt(jnp.maximum(square, 1e-12)).astype(margin.dtype)
        targets = flow.targets.astype(margin.dtype)
        losses = jnp.sum(targets * nu_svm_losses(margin, rho=state.rho, nu=nu), axis=-1)
        below = jnp.where(margin < state.rho.astype(margin.dtype), targets, 0).sum(axis=-1)
        short = jax.lax.stop_gradient(average(below, context)).astype(state.rho.dtype)
        step = jnp.asarray(step_size, short.dtype) * (short - jnp.asarray(nu, short.dtype))
        return flow._replace(value=losses), NuSVMState(state.rho - step), {"rho": state.rho, "short": short}

    return Perturbation("loss", init, apply, needs=("features", "head") if normalize else ())
