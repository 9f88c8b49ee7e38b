r"""What the margins on cosine logits share: u = s·cos θ with cos θ_c = ⟨a, w_c⟩/(‖a‖‖w_c‖), and a shift of the true class.

The scale s lives in the model: `head="cosine"` of perturbjax.models (features and rows normalised, no bias, s = 30), which acts at
evaluation too. A margin m of the cosine is s·m of the logit.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.link import Context

DEFAULT_SCALE = 30.0


def head_scale(scale: ArrayLike | None, context: Context) -> ArrayLike:
    """s: the setting if it is given, else the model's."""
    if scale is not None:
        return scale
    assert context.scale is not None  # "cosine" is among the needs
    return context.scale


def head_needs(scale: ArrayLike | None) -> tuple[str, ...]:
    """A cosine head, unless a scale is given (see Perturbation.needs)."""
    return ("cosine",) if scale is None else ()


def at_true_class(amounts: ArrayLike, labels: jax.Array, num_classes: int) -> jax.Array:
    """The amount at each sample's class, 0 elsewhere: [B, C], from amounts [B] or a number. Padding labels get zeros."""
    own = labels[:, None] == jnp.arange(num_classes, dtype=labels.dtype)[None]
    return jnp.where(own, jnp.broadcast_to(amounts, labels.shape)[:, None], 0)


def of_labels(by_class: jax.Array, labels: jax.Array) -> jax.Array:
    """[C] -> [B], each sample's own; 0 for padding."""
    return by_class.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)
