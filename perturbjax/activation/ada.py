r"""Adversarial data augmentation (ADA): also trains on inputs that are worse for the loss, but look alike to the network.

    x⁰ = x,   xᵏ⁺¹ = xᵏ + η ∇_x( ℓ(xᵏ) − γ · ½‖z(xᵏ) − z(x)‖² )   for T steps;      trained on ½ ℓ(x) + ½ ℓ(x^T)

z are the features: the transport cost of the original, whose relaxation takes γ as the multiplier of a ball's radius. The original
appends x^T of the whole data to the data in K = 3 rounds; here every batch is augmented, by the network as it is then. `bound` also keeps
x^T in a ball around x, which is LPA's reading (its eq. 5: projected gradient steps with samples as groups); inf: the original.
The two halves are two passes: BatchNorm keeps the statistics of the first one.
Source: Volpi et al., "Generalizing to Unseen Domains via Adversarial Data Augmentation", NeurIPS 2018, Algorithm 1; LPA eq. 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_number, is_traced
from perturbjax.feature.adversarial import pixel_range, require_floats, site_shape
from perturbjax.inference.pgd import pgd
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """½‖a_i − b_i‖² [B] over all other axes, in the type of `a`."""
    return 0.5 * jnp.sum((a - b.astype(a.dtype)).reshape(a.shape[0], -1) ** 2, axis=1)


@method(
    target="activation", direction=(+1,), inference="adversarial", granularity="sample",
    cite="Volpi et al., NeurIPS 2018", off=None,
)  # fmt: skip
def ada(
    *,
    gamma: ArrayLike = 1.0,
    step_size: ArrayLike = 1.0,
    num_steps: int = 15,
    bound: ArrayLike = np.inf,
    site: str = "input",
    features: str = "features",
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Perturbation:
    """ADA: half of the loss at the sample, half at the point that gradient ascent finds from there.

    Args:
      gamma: γ, the price of moving the features.
      step_size: η, times the raw gradient of the sample's own objective.
      num_steps: T.
      bound: radius of the l2 ball around the sample; inf: none.
      site: where the ascent is, "input" or any site before the features.
      features: the site of z.
      value_range: what the perturbed input is clipped to; None for inputs that are no pixels of [0, 1]. Other sites: no clipping.

    Raises ValueError, at init, for inputs outside the range, or a bound longer than any way between two images.

    Metrics: distance (½‖z(x^T) − z(x)‖², mean), raised (ℓ(x^T) − ℓ(x), mean), inner_evaluations.
    """
    check_number("ada", low=0, gamma=gamma, step_size=step_size)
    check_number("ada", low=0, infinite=True, bound=bound)
    check_number("ada", low=0, num_steps=num_steps)

    def init(context: Context) -> tuple:
        finite = {} if is_traced(bound) or np.isinf(bound).any() else {"bound": bound}
        site_shape("ada", context, norm="l2", value_range=value_range, **finite)
        return ()

    def apply(flow: Flow, rest: Rest, state: tuple, context: Context):
        require_floats("ada", flow.value, site)
        losses, clean = rest.flow(flow.value)
        z = jax.lax.stop_gradient(clean.trace[features])

        def worth(value: jax.Array) -> jax.Array:
            found, end = rest.flow(value)
            away = squared_distance(end.trace[features].astype(found.dtype), z)
            return found - jnp.asarray(gamma, found.dtype) * away

        delta, _ = pgd(
            worth, flow.value, None, flow.labels.shape[0], step="raw", step_size=step_size, num_steps=num_steps, bound=bound,
            value_range=pixel_range(value_range, context), axis_name=context.axis_name,
        )  # fmt: skip
        worse, end = rest.flow(flow.value + delta)
        paid = 0.5 * end.weights.astype(worse.dtype) * worse
        flow = flow._replace(penalty=flow.penalty + paid.astype(flow.penalty.dtype), weights=0.5 * flow.weights)
        away = squared_distance(end.trace[features], z)
        metrics = {"distance": away.mean(), "raised": (worse - losses).mean()}
        # Two units of work each: T gradients, the clean pass (one unit), and the pass at the end, which trains the network (three).
        return flow, state, metrics | {"inner_evaluations": jnp.float32(num_steps + 2)}

    return Perturbation(site, init, apply, search=True, needs=(features,))
