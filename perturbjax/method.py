"""Where a method stands in the taxonomy, and @method, which writes it on the method."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from perturbjax.checks import on_host
from perturbjax.link import Perturbation
from perturbjax.names import by_name
from perturbjax.optimizer_link import GRADIENTS as GRADIENT_KINDS
from perturbjax.optimizer_link import Gradient
from perturbjax.optimizer_link import named as named_link


class Coordinates(NamedTuple):
    """Where a method stands in the taxonomy (section 4): what is perturbed, which way the loss goes, how, for whom."""

    target: tuple[str, ...]
    direction: tuple[int, ...]  # of +1 (raises the loss) and -1 (lowers it); () where there is no fixed sign
    inference: str
    granularity: tuple[str, ...]


TARGETS = ("feature", "activation", "logit", "label", "loss", "logit gradient", "gradient", "parameter")
INFERENCES = ("prior", "hyper-parameter", "regularised", "meta", "adversarial")
GRANULARITIES = ("sample", "category", "corpus")


def method(
    *,
    target: str | tuple[str, ...],
    direction: tuple[int, ...],
    inference: str,
    granularity: str | tuple[str, ...],
    cite: str,
    off: Mapping[str, Any] | None,
    alias: str | None = None,
    resolve_structure: Callable[[dict], dict] | None = None,
    asks: Callable[[dict], dict] | None = None,
    gradient: Gradient | None = None,
) -> Callable[[Callable], Callable]:
    """Registers a factory: gives it its coordinates, which the table, the command line and the contract tests read.

    Args:
      target, direction, inference, granularity: see Coordinates; several targets or granularities as a tuple.
      cite: "Author et al., Venue year".
      off: the settings that are plain training, bit for bit where XLA merges no operations; None where there are none (mixup, PUGD).
      alias: short name on the command line.
      resolve_structure: settings as numbers -> further settings that fix the shape of the computation (a loop's length), for
        callers that trace the numbers afterwards.
      asks: settings -> what a link can't do and the trainer does for it: {"replays": m}, every batch m times in a row, or
        {"fine_tuning": {"start": ..., "rate": ...}}, class-balanced batches in the last part, or {"second_view": True}, each sample
        augmented once more, as side["second_view"], or {"swad_rule": "paper" | "code"}, which window domains.py averages over.
      gradient: of an optax link, what it does with the gradient that it is given: "keeps", "transforms", or "replaces" it by gradients
        that it asks `grad_fn` for. Nothing may change the gradient before a link that replaces it. None: found out by watching it.
    """
    tuple_of = lambda x: (x,) if isinstance(x, str) else tuple(x)
    coordinates = Coordinates(tuple_of(target), tuple(direction), inference, tuple_of(granularity))
    for value, known in [*((t, TARGETS) for t in coordinates.target), (inference, INFERENCES)] + [
        (g, GRANULARITIES) for g in coordinates.granularity
    ]:
        if value not in known:
            raise ValueError(f"method needs coordinates out of {known}, got {value!r}.")
    if gradient is not None and gradient not in GRADIENT_KINDS:
        raise ValueError(f"method needs gradient out of {GRADIENT_KINDS}, got {gradient!r}. Write gradient='transforms'.")

    def wrap(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def named(*values, **settings):
            known = {name: on_host(value) for name, value in by_name(factory, values, settings).items()}
            return _named(factory(**known), factory.__name__, gradient)

        make: Any = named
        make.coordinates, make.cite, make.off, make.alias = coordinates, cite, off, alias
        make.gradient = gradient
        make.asks = asks or (lambda settings: {})
        if resolve_structure is not None:
            make.resolve_structure = resolve_structure
        return make

    return wrap


def _named(made: Any, name: str, gradient: Gradient | None) -> Any:
    if isinstance(made, Perturbation):
        return made._replace(name=name)
    if hasattr(made, "update"):
        return named_link(made, name, gradient)
    if type(made) is tuple:
        return tuple(_named(link, name, gradient) for link in made)
    return made
