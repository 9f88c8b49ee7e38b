r"""Center loss: pulls the features of each class towards the class's centre.

    ℓ + (λ/2) ‖a − c_y‖²,   then   c_j ← c_j − α · Σ_{i: y_i = j}(c_j − a_i)/(1 + n_j)      (n_j: samples of class j in the batch)

Centres start at zero, are constants for the gradient, and move once a step, after use. Mixed samples belong to their dominant class.
Source: Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, class_count, class_sum, wide
from perturbjax.link import Context, Flow, Perturbation, Rest
from perturbjax.method import method


class CenterState(NamedTuple):
    """What the next step needs."""

    centers: jax.Array  # [C, d]


def center_penalty(features: jax.Array, labels: jax.Array, centers: jax.Array) -> jax.Array:
    """½‖a − c_y‖²: [B], from features [B, d], labels [B] and centres [C, d]; zero for labels of no class (padding).

    >>> print(center_penalty(jnp.array([[1.0, 2.0]]), jnp.array([1]), jnp.zeros([2, 2])))
    [2.5]
    """
    a = wide(features)
    own = centers.astype(a.dtype).at[labels].get(mode="clip")
    known = (labels >= 0) & (labels < centers.shape[0])
    return jnp.where(known, 0.5 * jnp.sum((a - own) ** 2, axis=-1), 0)


def moved_centers(
    centers: jax.Array, features: jax.Array, labels: jax.Array, *, step_size: ArrayLike = 0.5, axis_name: AxisName = None
) -> jax.Array:
    """The centres [C, d] after one step towards the batch's features; those of absent classes stay."""
    total = class_sum(jax.lax.stop_gradient(features), labels, centers.shape[0], axis_name=axis_name).astype(centers.dtype)
    count = class_count(labels, centers.shape[0], axis_name=axis_name, dtype=centers.dtype)[:, None]
    return centers - jnp.asarray(step_size, centers.dtype) * (count * centers - total) / (1 + count)


@method(
    target="loss", direction=(+1,), inference="prior", granularity="category",
    cite="Wen et al., ECCV 2016", off=dict(weight=0.0), alias="center",
)  # fmt: skip
def center_loss(*, weight: ArrayLike = 0.003, step_size: ArrayLike = 0.5) -> Perturbation:
    """Center loss: adds λ = `weight` times half the squared distance of the features from their class's running centre.

    step_size: α in [0, 1], of the centres. Needs the site "features", before whose other links in the chain it looks.
    """
    check_number("center_loss", low=0, weight=weight)
    check_number("center_loss", low=0, high=1, step_size=step_size)

    def init(context: Context) -> CenterState:
        return CenterState(jnp.zeros([context.num_classes, context.features_size()], context.dtype))

    def apply(flow: Flow, rest: Rest, state: CenterState, context: Context):
        distance = center_penalty(flow.value, flow.labels, state.centers)
        added = jnp.asarray(weight, distance.dtype) * distance
        after = moved_centers(state.centers, flow.value, flow.labels, step_size=step_size, axis_name=context.axis_name)
        flow = flow._replace(penalty=flow.penalty + added.astype(flow.penalty.dtype))
        return flow, CenterState(after), {"distance": distance.mean()}

    return Perturbation("features", init, apply)
