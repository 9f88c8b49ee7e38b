r"""Gradient noise: Gaussian noise on every coordinate of the gradient, annealed.

    g̃ = g + N(0, σ_t²),    σ_t² = η/(1 + t)^γ

Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015; LPG eq. 4. The noise is
`optax.add_noise`'s; the key comes with each update instead of living in the state, so that it follows the run's seed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method


class GradientNoiseState(NamedTuple):
    """State of `gradient_noise`."""

    count: jax.Array  # [] int32, steps taken


@method(
    target="gradient", direction=(), inference="prior", granularity="corpus",
    cite="Neelakantan et al., 2015", gradient="transforms", off=dict(eta=0.0), alias="noise",
)  # fmt: skip
def gradient_noise(*, eta: ArrayLike = 1e-4, gamma: ArrayLike = 0.55) -> optax.GradientTransformationExtraArgs:
    """An optax link that adds noise of variance η/(1 + t)^γ with η = `eta` and γ = `gamma`.

    The noise is on every coordinate, its norm √(η·d) for d parameters: √η = 0.01 is about a gradient's root mean square coordinate in a
    small convolutional net (norm 1, d = 10⁴), so that the default is felt and averages out. The paper tries η = 0.01, 0.3 and 1, on its
    own very deep and hard-to-train nets and with clipped gradients; on a plain net these drown the gradient.

    `update` takes `key=`, a new one each step.
    """
    check_number("gradient_noise", low=0, eta=eta, gamma=gamma)

    def init(params):
        return GradientNoiseState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, key=None, **extra_args):
        if key is None:
            raise ValueError(
                "gradient_noise needs `key`, got none: call tx.update(grads, state, params, key=jax.random.key(step))."
            )
        noisy, after = optax.add_noise(eta, gamma, key).update(updates, optax.AddNoiseState(state.count, key), params)
        return noisy, GradientNoiseState(after.count)

    return optax.GradientTransformationExtraArgs(init, update)
