"""What trainer and analyses do with methods of both kinds, perturbations of the loss and optax links."""

from typing import Any

import optax

from perturbjax.link import Chain, chain
from perturbjax.optimizer_link import check_order


def split_methods(methods: Any) -> tuple[Chain, tuple[optax.GradientTransformation, ...]]:
    """One method, or several, as a chain for the loss and links for the optimiser, each in the order given.

    Raises ValueError for links of the optimiser of which a later one would throw an earlier one's work away.
    """
    is_link = lambda one: hasattr(one, "update") and hasattr(one, "init")
    each = [methods] if is_link(methods) or hasattr(methods, "site") else list(methods)
    transforms = tuple(filter(is_link, each))
    check_order(transforms)
    return chain(*(one for one in each if not is_link(one))), transforms
