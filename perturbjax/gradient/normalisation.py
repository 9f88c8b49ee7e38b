r"""Normalised gradient descent: only the gradient's direction counts.

    g̃ = g/‖g‖

Source: Nesterov, 1984; Murray et al., "Revisiting Normalized Gradient Descent: Fast Evasion of Saddle Points", IEEE TAC 2019 (the RTS
draft's reference 8). `optax.contrib.normalize` with the norm in at least float32, and with zero staying zero instead of becoming nan.
It is also PUGD with radius 0, and the inactive steps of `rts(inactive="unit")`.
"""

import optax
from jax.typing import ArrayLike

from perturbjax.checks import check_number
from perturbjax.method import method
from perturbjax.parameter.ascent import unit_tree


@method(
    target="gradient", direction=(), inference="prior", granularity="corpus",
    cite="Murray et al., IEEE TAC 2019", gradient="transforms", off=None,
)  # fmt: skip
def ngd(*, epsilon: ArrayLike = 0.0) -> optax.GradientTransformationExtraArgs:
    """An optax link: the gradient over its norm, one norm for all parameters; `epsilon` is added to the norm."""
    check_number("ngd", low=0, epsilon=epsilon)
    return optax.with_extra_args_support(optax.stateless(lambda updates, params: unit_tree(updates, epsilon)))
