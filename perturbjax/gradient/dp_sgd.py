r"""Clipped per-sample gradients with noise (DP-SGD): no single sample moves the parameters far, and noise hides how far.

    g̃ = (1/B) (Σ_i g_i · min(1, τ/‖g_i‖) + N(0, σ²τ²))

τ is the bound on a sample's gradient, σ the noise multiplier. Equal to `optax.contrib.differentially_private_aggregate` on the stacked
gradients, with its noise bit for bit; here the gradients come from `grad_fn`, a chunk at a time if wanted, and the key from the run.

A guarantee of privacy needs each g_i to depend on sample i alone. With BatchNorm every sample shifts all others' gradients, so there is
none; nor with methods that take statistics or partners from the batch (LPL, mixup), or with penalties of the loss. And it needs an
accountant: none is here, and batches are drawn by shuffling, not by Poisson sampling. As a perturbation it is for any net.
Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.classes import wide
from perturbjax.gradient.groups import added, example_members, require_key, require_weights
from perturbjax.method import method
from perturbjax.parameter.asking import Mask, asking


class DPSGDState(NamedTuple):
    """State of `dp_sgd`."""

    evaluations: jax.Array  # [] int32, gradients asked of grad_fn so far


def clipped(gradient: Any, bound: ArrayLike) -> Any:
    """g · min(1, τ/‖g‖), one norm over all leaves; zero stays zero."""
    gradient = jax.tree.map(wide, gradient)
    norm = optax.tree.norm(gradient)
    factor = jnp.where(norm > bound, bound / jnp.where(norm > bound, norm, 1), 1)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)


@method(
    target="gradient", direction=(-1,), inference="prior", granularity="sample",
    cite="Abadi et al., CCS 2016", gradient="replaces", off=None,
)  # fmt: skip
def dp_sgd(
    *, bound: ArrayLike = 1.0, noise_multiplier: ArrayLike = 1.0, chunk: int | None = None, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """An optax link. Costs B + 1 more gradients a step (one forward pass, B + 1 backward passes of the batch): for small nets.

    Args:
      bound: τ, the largest l2 norm of a sample's gradient; inf clips nothing.
      noise_multiplier: σ, in units of τ; 0 adds no noise (with bound=inf this is plain training, to rounding).
      chunk: so many gradients at a time: memory is chunk times the parameters; None: all B.
      mask: as in `pcgrad`: samples are clipped by the norms of these parameters alone. The others' gradients are plain, neither
        clipped nor noisy: there is no guarantee unless they are frozen.

    `update` takes `grad_fn=` (parameters, weights=[B] -> the gradient of the weighted mean loss), `labels=`, whose length is B, `key=`,
    and in per-device code `axis_name=`. It replaces the gradient that it is given: put it first.
    """
    check_number("dp_sgd", low=0, open_low=True, infinite=True, bound=bound)
    check_number("dp_sgd", low=0, noise_multiplier=noise_multiplier)
    check_number("dp_sgd", low=1, chunk=chunk)

    def init(params):
        return DPSGDState(jnp.zeros([], jnp.int32))

    def update(updates, state, params, *, grad_fn, key=None, labels=None, axis_name=None, **extra_args):
        require_weights("dp_sgd", grad_fn)
        require_key("dp_sgd", key)
        if labels is None:
            raise ValueError(
                "dp_sgd needs `labels`, got none: call tx.update(grads, state, params, grad_fn=grad_fn, labels=labels)."
            )
        members = example_members(labels.shape[0], axis_name)
        size = len(members)
        penalty = jax.tree.map(wide, grad_fn(params, weights=jnp.zeros_like(members[0])))

        def of_one(row):
            gradient = jax.tree.map(wide, grad_fn(params, weights=row))
            return clipped(jax.tree.map(lambda g, p: size * (g - p), gradient, penalty), bound)

        each = jax.vmap(of_one)(members) if chunk is None else jax.lax.map(of_one, members, batch_size=chunk)
        total, form = jax.tree.flatten(jax.tree.map(lambda g: g.sum(0), each))
        # bound = inf without noise is inf · 0
        scale = jnp.where(jnp.asarray(noise_multiplier) > 0, jnp.asarray(bound) * jnp.asarray(noise_multiplier), 0)
        _, *keys = jax.random.split(key, len(total) + 1)
        noisy = [g + scale.astype(g.dtype) * jax.random.normal(k, g.shape, g.dtype) for g, k in zip(total, keys, strict=True)]
        mean = jax.tree.unflatten(form, [g / size for g in noisy])
        after = jax.tree.map(lambda u, g: g.astype(u.dtype), updates, added(mean, penalty))
        return after, DPSGDState(state.evaluations + size + 1)

    return asking("dp_sgd", init, update, mask=mask)
