r"""Amplification: how far a perturbation of the activations moves the logits, measured and bounded.

    ‖f_{l+1:L}(a + δ) − f_{l+1:L}(a)‖ / ‖δ‖  ≤  K_l  ≤  Π_{layers behind l} ‖W‖₂

K_l, the Lipschitz constant of the layers behind the site, is the largest ‖∂u/∂a‖₂ anywhere. At one a, `local_amplification` finds it
by power iteration: what small perturbations can do there at most, and K_l itself where all that follows is linear (features; pooling
and the head). The product of the layers' norms holds everywhere, and is loose.
Source: "Learning to Perturb Activations" (LPA), section 3.8.2, Proposition 2 (eq. 17).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from perturbjax.checks import check_number
from perturbjax.classes import AxisName, class_mean, wide
from perturbjax.line import line
from perturbjax.projection import group_norm, unit


def amplification(clean: jax.Array, moved: jax.Array, delta: jax.Array, *, axis_name: AxisName = None) -> jax.Array:
    """Mean of ‖ũ_i − u_i‖/‖δ_i‖ over the samples with δ_i ≠ 0, of logits [B, C] and delta [B, ...]: a number; 0 if there are none.

    >>> delta = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    >>> print(amplification(jnp.zeros([2, 2]), 2 * delta, delta))
    2.0
    """
    length = group_norm(wide(delta))
    here = length > 0
    ratio = jnp.where(here, group_norm(wide(moved) - wide(clean)).astype(length.dtype) / jnp.where(here, length, 1), 0)
    return class_mean(ratio, jnp.where(here, 0, 1), 2, axis_name=axis_name)[0]


def local_amplification(
    model: Any,
    params: Any,
    inputs: jax.Array,
    *,
    site: str,
    stats: Any = None,
    num_steps: int = 30,
    key: jax.Array | None = None,
) -> jax.Array:
    """‖∂u_i/∂a_i‖₂ of each sample [B], the largest singular value, in evaluation mode (BatchNorm: running statistics). Jits.

    Args:
      model, params, stats: as for `pj.objective`. inputs: [B, ...]. site: where a is; "last_stage" is the one before the pooling.
      num_steps: of the power iteration, which comes from below: after k steps the share (σ_2/σ_1)^(4k) of the squared norm is missing
        at most, about. key: of its start; None: key 0.

    >>> net = {"features": lambda w, x: jnp.tanh(x), "logits": lambda w, a: a @ w}
    >>> print(local_amplification(net, jnp.diag(jnp.array([3.0, 1.0])), jnp.ones([1, 2]), site="features").round(4))
    [3.]
    """
    check_number("local_amplification", low=1, num_steps=num_steps)
    made = line(model)
    site = made.site(site)
    options = {} if made.side is None else {"side": made.side(inputs)}
    run = functools.partial(made.slice, params, stats=stats, train=False, key=None, **options)
    value = run(inputs, "input" if "input" in made.sites else made.sites[0], site)[0]
    logits, pull = jax.vjp(lambda a: wide(run(a, site, "logits")[0]), value)
    back = lambda u: wide(pull(u)[0])
    push = lambda v: jax.vjp(back, jnp.zeros_like(logits))[1](v)[
        0
    ]  # J v by reverse mode twice: not all layers have a forward mode
    start = jax.random.normal(jax.random.key(0) if key is None else key, logits.shape, logits.dtype)
    vector = jax.lax.fori_loop(0, num_steps, lambda _, v: unit(back(push(v))), unit(back(start)))
    return group_norm(push(vector))


def lipschitz_product(*weights: jax.Array) -> jax.Array:
    """Π ‖W‖₂ ≥ K_l of the layers behind the site: kernels [in, out], or of convolutions [..., in, out], as Flax keeps them.

    Between them may stand what has slope 1 at most: ReLU, tanh, pooling, dropout switched off. A residual connection x + f(x) makes a
    factor of 1 + Π_f, a BatchNorm that of max |γ|/√(variance): multiply by those. A convolution counts √(its positions) · the norm of
    the kernel as a matrix, which it can't exceed.

    >>> print(lipschitz_product(jnp.diag(jnp.array([2.0, 1.0])), jnp.full([3, 3, 1, 1], 1.0)))
    18.0
    """
    norm = lambda w: jnp.linalg.norm(wide(w).reshape(-1, w.shape[-1]), ord=2) * math.sqrt(math.prod(w.shape[:-2]))
    return functools.reduce(jnp.multiply, map(norm, weights))
