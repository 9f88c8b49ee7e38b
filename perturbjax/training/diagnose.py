"""What started a divergence: the steps since a good state once more, then link by link through the bad one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perturbjax.chains import split_methods
from perturbjax.data import Dataset
from perturbjax.frozen import join_params, split_params
from perturbjax.training.devices import Devices
from perturbjax.training.feed import Call, Feed
from perturbjax.training.step import (
    DeviceData,
    Recipe,
    TrainState,
    as_arrays,
    build,
    compiled_step,
    draw_batch,
    evaluate_loss,
    step_keys,
    update_arguments,
)

LIMIT = 1000.0
"""A loss above LIMIT · log(C) is a divergence: a classifier that knows nothing has log(C)."""


class Trouble(NamedTuple):
    """The first bad loss."""

    loss: float
    step: int  # steps taken before it
    run: int

    @classmethod
    def of(cls, loss: float, step: int, run: int, num_classes: int) -> "Trouble | None":
        """None for a loss as it should be."""
        return None if abs(loss) <= LIMIT * math.log(num_classes) else cls(loss, step, run)  # nan compares false


class Plain(NamedTuple):
    """What became of plain training in the method's place."""

    begin: int  # steps taken before it
    loss: float  # the last one
    diverges: bool


def explain(recipe: Recipe, dataset: Dataset, numbers: dict, seed: int, state: TrainState, last: int, streamed: bool) -> str:
    """Sentences that name the link and the value that started the bad loss at step `last`.

    state: a good one before it, of this run alone, on one device.
    """
    feed = Feed(recipe, [dataset], [seed], Devices(), 1, streamed, False)
    data, arrays, step = feed.data(), as_arrays(numbers), compiled_step(recipe)
    before: tuple[TrainState, Call] | None = None
    begun = jax.tree.map(jnp.copy, state)
    plainly = lambda: trained_plainly(recipe, arrays, data, begun, feed, last)
    for call in feed.calls_here(int(state.step)):
        if call.first > last:
            break
        kept = jax.tree.map(jnp.copy, state)
        state, metrics, _ = step(state, arrays, data, call.index, call.images)
        if Trouble.of(float(metrics["loss"][0]), call.first, 0, recipe.num_classes) is not None:
            return _Step(recipe, arrays, data, kept, call, plainly).verdict(before)
        if not math.isfinite(largest(state.params)[1]):
            return _Step(recipe, arrays, data, kept, call, plainly).update()
        before = (kept, call)
    return "On a single device, step by step, it does not happen: the numbers are at the edge. Lower the learning rate."


def trained_plainly(recipe: Recipe, numbers: dict, data: DeviceData, state: TrainState, feed: Feed, last: int) -> Plain:
    """Plain training in the method's place, from this good state on, on the same batches up to step `last`."""
    begin, loss, step = int(state.step), math.nan, compiled_step(dataclasses.replace(recipe, build=_no_method))
    # The optimiser's last state is the descent's, behind all links.
    state = jax.tree.map(jnp.copy, state._replace(states=(), opt_state=state.opt_state[-1:]))
    for call in feed.calls_here(begin):
        if call.first > last:
            break
        state, metrics, _ = step(state, numbers, data, call.index, call.images)
        loss = float(metrics["loss"][0])
        if Trouble.of(loss, call.first, 0, recipe.num_classes) is not None:
            return Plain(begin, loss, True)
    return Plain(begin, loss, False)


def _no_method(numbers: Any) -> tuple:
    return ()


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of training, to be looked at piece by piece."""

    recipe: Recipe
    numbers: dict
    data: DeviceData
    state: TrainState
    call: Call
    plainly: Callable[[], Plain]
    """Plain training in the method's place; trains."""

    def verdict(self, before: tuple[TrainState, Call] | None) -> str:
        name, size = largest(self.state.params)
        if not math.isfinite(size) and before is not None:
            return dataclasses.replace(self, state=before[0], call=before[1]).update()
        return self.forward(f"The largest parameter is {size:.3g} in absolute value (in {name}).")

    def forward(self, parameters: str) -> str:
        """Which link of the loss it was, by running the pass with the first 0, 1, 2 … of them."""
        made, losses = self.pieces()
        sizes = [float(np.abs(found).max()) for found in losses]
        bad = lambda size: not size <= LIMIT * math.log(self.recipe.num_classes)
        first = next((k for k, size in enumerate(sizes) if bad(size)), None)
        if first is None:  # no single loss is beyond the limit: all together
            return f"All samples' losses are large. {parameters} Lower the learning rate."
        worst = self.worst(losses[first])
        if first == 0:
            return self.without_links(worst, parameters)
        link = made.links[first - 1]
        return (
            f"It started at {link.name or 'a link'} (link {first} of {len(made.links)}, at site {link.site}): {worst}; without it, the "
            f"largest loss of the batch is {sizes[first - 1]:.3g}. Lower its bound or step size. {parameters}"
        )

    def without_links(self, worst: str, parameters: str) -> str:
        """Whether it was plain training or the method, where the pass without any link is bad."""
        links, transforms = split_methods(self.recipe.build(self.numbers["method"]))
        names = [link.name or "a link" for link in links] + [link_name(link) for link in transforms]
        method, plain = " and ".join(dict.fromkeys(names)), self.plainly() if names else None
        if plain is None or (plain.diverges and plain.begin == 0):
            alone = "" if plain is None else ", and training without any goes the same way"
            return f"It started in plain cross entropy, before any perturbation: {worst}{alone}. {parameters} Lower the learning rate."
        too = f"At the weights that this step began with, plain cross entropy is bad too: {worst}. {parameters}"
        if plain.diverges:
            return (
                f"{too} Plain training from step {plain.begin + 1} on goes the same way, but from weights that {method} had made: which of "
                "them it was can't be told from here. Train ce with the same settings to see, or lower the learning rate."
            )
        return (
            f"{too} Plain training is not at fault: from step {plain.begin + 1} on, on the same batches, it has a loss of {plain.loss:.3g} "
            f"there. It was {method} that led to these weights: lower its bound, step size or radius, or the learning rate."
        )

    def update(self) -> str:
        """Which link of the optimiser it was, in the step before: the first that turns finite updates into others."""
        links, transforms = split_methods(self.recipe.build(self.numbers["method"]))
        made, tx = build(self.recipe, self.numbers, self.data.class_counts)
        batch, key = self.batch(), step_keys(self.state)[0]
        trained, frozen = split_params(self.state.params, self.recipe.frozen)
        loss = lambda own: evaluate_loss(made, join_params(own, frozen), self.state, self.recipe, batch, key)
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        when = f"in the update of step {self.call.first + 1}"
        name, size = largest(grads)
        if not math.isfinite(size):
            return (
                f"It started {when}, whose loss is {float(value):.3g} but whose gradient is {size} in {name}. "
                + self.forward("")
            )
        arguments, updates = update_arguments(made, self.state, self.recipe, batch, value, grads), grads
        for number, (link, state) in enumerate(zip(transforms, self.state.opt_state, strict=False), start=1):
            before = largest(updates)[1]
            updates, _ = optax.with_extra_args_support(link).update(updates, state, trained, **arguments)
            name, size = largest(updates)
            if not math.isfinite(size):
                return (
                    f"It started {when}, at {link_name(link)} (link {number} of the optimiser): the update of {name} is {size}, "
                    f"where the largest before was {before:.3g}. Lower its radius or bound."
                )
        return (
            f"It started {when} with the update itself: the largest gradient is {size:.3g} (in {name}), too much for this learning rate. "
            "Lower it, or clip gradients (clip(1))."
        )

    def pieces(self):
        """(objective, [losses [B] with the first k links, for k = 0 … all])."""
        made, _ = build(self.recipe, self.numbers, self.data.class_counts)
        batch, key, found = self.batch(), step_keys(self.state)[0], []
        for k in range(len(made.links) + 1):
            part = dataclasses.replace(made, links=made.links[:k])
            state = self.state._replace(states=self.state.states[:k])
            found.append(np.asarray(evaluate_loss(part, self.state.params, state, self.recipe, batch, key)[1].losses))
        return made, found

    def batch(self):
        images = None if self.call.images is None else self.call.images[0]
        return draw_batch(self.recipe, self.state, self.data, self.call.index[0], images)

    def worst(self, losses: np.ndarray) -> str:
        """The first sample whose loss is not finite, or else the largest."""
        broken = np.flatnonzero(~np.isfinite(losses))
        i = int(broken[0]) if broken.size else int(np.abs(losses).argmax())
        many = f", one of {broken.size} such losses of {losses.size}" if broken.size > 1 else ""
        return f"the loss of sample {int(self.call.index[0, i])} is {losses[i]:.3g}{many}"


def largest(tree: Any) -> tuple[str, float]:
    """(path, absolute value) of the first leaf that is not finite, or else of the largest value."""
    found = [("/".join(str(getattr(k, "key", k)) for k in path), float(jnp.abs(x).max()))
             for path, x in jax.tree_util.tree_leaves_with_path(tree) if np.size(x)]  # fmt: skip
    broken = [pair for pair in found if not math.isfinite(pair[1])]
    return broken[0] if broken else max(found, key=lambda pair: pair[1])


def link_name(link: Any) -> str:
    """What a link of the optimiser is called: a method's name, or of optax's own the factory, the outer function of its update."""
    return getattr(link, "name", None) or getattr(link.update, "__qualname__", "a link").split(".")[0]
