"""A link of the optimiser that says what it does with the gradient it is given, so that links which undo each other can be found.

A link either *transforms* the gradient (clipping, noise) or *replaces* it by gradients that it asks `grad_fn` for (SAM, PCGrad, DP-SGD).
What a link that replaces is given is the batch's own gradient, or else somebody's work is thrown away. So there is one rule, which
`check_order` applies to methods in a row and `perturbjax.check_optimizer` to any optimiser: nothing changes the gradient before a link
that replaces it.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import optax

Gradient = Literal["keeps", "transforms", "replaces"]
"""What a link does with the gradient that it is given: passes it on as it is; makes something of it; asks for its own."""

GRADIENTS = ("keeps", "transforms", "replaces")


class OptimizerLink(optax.GradientTransformationExtraArgs):
    """An optax transformation that knows its name and what it does with the gradient; to optax it is like any other."""

    name: str
    gradient: Gradient | None  # None: not declared

    def __new__(cls, init: Callable, update: Callable, name: str = "a link", gradient: Gradient | None = None):
        """As optax's own, with a name for messages."""
        made = super().__new__(cls, init, update)
        made.name, made.gradient = name, gradient
        return made


@dataclasses.dataclass
class Visit:
    """One call of a link's update while `watched`."""

    name: str
    gradient: Gradient | None
    state: Any  # that it was given
    received: list[Any]  # leaves of the updates that it was given
    returned: list[Any] = dataclasses.field(default_factory=list)
    asked: bool = False  # whether it called grad_fn

    @property
    def replaces(self) -> bool:
        """As declared; undeclared: whether it asked for gradients."""
        return self.asked if self.gradient is None else self.gradient == "replaces"


_watching = contextvars.ContextVar[list[Visit] | None]("watching", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[Visit]]:
    """The calls of links within, in their order. For `check_optimizer`, which traces one update."""
    visits: list[Visit] = []
    token = _watching.set(visits)
    try:
        yield visits
    finally:
        _watching.reset(token)


def named(made: optax.GradientTransformation, name: str, gradient: Gradient | None = None) -> OptimizerLink:
    """The transformation with a name, and with extra arguments that it does not know ignored."""
    inner = optax.with_extra_args_support(made)

    def update(updates, state, params=None, **extra_args):
        if (visits := _watching.get()) is None:
            return inner.update(updates, state, params, **extra_args)
        visit = Visit(name, gradient, state, jax.tree.leaves(updates))
        visits.append(visit)
        if (grad_fn := extra_args.get("grad_fn")) is not None:

            @functools.wraps(grad_fn)
            def counted(*args, **options):
                visit.asked = True
                return grad_fn(*args, **options)

            extra_args["grad_fn"] = counted
        out, after = inner.update(updates, state, params, **extra_args)
        visit.returned = jax.tree.leaves(out)
        return out, after

    return OptimizerLink(inner.init, update, name, gradient)


def check_order(transforms: Sequence[optax.GradientTransformation]) -> None:
    """Raises ValueError for methods in a row of which a later one throws an earlier one's work away; says the order to write.

    Links that don't say what they do (optax's own) are left to `perturbjax.check_optimizer`, which watches them.
    """
    before: Any = None
    for link in transforms:
        kind = getattr(link, "gradient", None)
        if kind == "replaces" and before is not None:
            raise ValueError(undone(link.name, before.name, before.gradient))
        if kind in ("transforms", "replaces"):
            before = link


def undone(later: str, earlier: str | None, gradient: Gradient | None) -> str:
    """The message: the link `later` would throw away what `earlier` (None: a link of optax) made of the gradient; and what to write."""
    who = earlier or "a link of optax before it (weight decay, clipping, a learning rate)"
    reason = (
        f"{later} needs the batch's own gradient, got what {who} made of it: {later} asks for gradients of its own, and the work of "
        f"{earlier or 'that link'} would be thrown away."
    )
    if gradient == "replaces":
        one = "Write it once" if earlier == later else f"Write {earlier} or {later}, one of them"
        return f"{reason} So does {earlier}: in no order do both act. {one}; for two groups of parameters, optax.partition."
    if earlier is None:
        return f"{reason} Write optax.chain(pj.{later}(...), ...), with {later} first."
    return f"{reason} Write {later}+{earlier}, or in Python optax.chain(pj.{later}(...), pj.{earlier}(...), ...)."
