"""A link of the chain, and what it is given and gives: Flow, Context, Rest, Perturbation, chain.

A `Perturbation` is one link at one site of the line (`perturbjax.core`): `apply` gets the flow at its site, the rest of the pass from there,
its own state and what else it may know, and returns the flow with another value.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import is_traced
from perturbjax.classes import AxisName, number

TAIL = ("prediction", "label", "loss", "logit_gradient")
"""The sites after the logits: log softmax(u) [B, C], the targets [B, C], the losses [B], ∂ℓ/∂u [B, C]."""

CLEAN = "clean logits"
"""In `Flow.extra`: (whether there are any yet [] bool, the logits [B, C] of the pass without what links have found by a search or put in
by the label). Left by the first such link."""

COUNTED = "counted samples"
"""In `Flow.extra`: [B] bool, False for the samples to which the batch itself gives the weight 0: padding. Absent: all count."""

CLOSE = 1e-6
"""Shares of a run that lie nearer to each other are one: half a step of a run of 500,000."""


class Flow(NamedTuple):
    """What travels down the line. A link may change the number of samples B in all per-sample fields at once."""

    value: jax.Array  # [B, ...], the value at the current site
    labels: jax.Array  # [B] int32, the (after mixing: dominant) class, which groups are made of
    targets: jax.Array  # [B, C], what the loss compares with
    weights: jax.Array  # [B], factors of the losses
    index: jax.Array  # [B] int32, position in the data set; noise per sample is keyed by it
    side: Mapping[str, jax.Array]  # side information of the data, each [B, ...]: domain, group
    trace: Mapping[str, jax.Array]  # values of earlier sites, after their links
    extra: Mapping[str, Any]  # what one link leaves for a later one; absent means "do nothing"
    penalty: jax.Array  # [B], added to the weighted losses at the end
    stats: Any  # BatchNorm statistics as updated so far: kept by the outer pass, thrown away by `rest`


class Where(NamedTuple):
    """Where training stands; None: not told."""

    step: ArrayLike | None = None  # optimiser steps taken
    progress: ArrayLike | None = None  # step / total steps
    epoch: ArrayLike | None = None


class Context(NamedTuple):
    """What a link may know besides the flow. `init` sees the first group of fields, `apply` all of them.

    `step`, `progress` and `epoch` raise ValueError where they were not told: a schedule that stood still, or statistics of an epoch
    that never ends, would be plain training without a word.
    """

    num_classes: int
    class_counts: jax.Array | None = None  # [C] training samples of each class
    num_examples: int | None = None
    batch_size: int | None = None
    num_domains: int | None = None
    axis_name: AxisName = None
    balanced_from: float | None = None  # share of training after which batches are drawn class-balanced; None: never
    replays: int = 1  # how often each batch comes in a row
    site: str | None = None  # where this link acts
    level: Callable[[str], int] | None = None  # number of a site, for layer-scaled bounds (Line.level)
    site_shapes: Mapping[str, tuple[int, ...]] | None = None  # at init only: shape of a batch's value at each site
    steps_per_epoch: int | None = None  # None: full batches in num_examples
    inputs: Any = None  # at init only: the batch that it was given, if its numbers are known there
    name: str = ""  # of the link's method, for messages
    where: Where = Where()
    key: jax.Array | None = None  # this link's own key, the same in `rest`, in the outer pass and in a second pass
    variables: Any = None  # the differentiated ones
    head: Callable[[], tuple[jax.Array, jax.Array]] | None = None  # () -> (W [C, d], b [C])
    pullback: Callable[[], Callable[[jax.Array], Any]] | None = None  # at the logit gradient: () -> (v [B, C] -> Σ_i J_i v_i)
    scale: float | None = None  # s of a cosine head, whose logits are s·cos θ; the model's own
    validation: Any = None  # a clean batch, for meta-learning
    float_type: Any = None  # of the pass; None: JAX's own

    @property
    def dtype(self) -> Any:
        """The float type of settings, statistics and states: float64 where parameters or inputs are, else float32."""
        return jnp.result_type(float) if self.float_type is None else self.float_type

    @property
    def step(self) -> ArrayLike:
        """Optimiser steps taken."""
        return self._told("step", "step=i, the optimiser steps taken so far")

    @property
    def progress(self) -> ArrayLike:
        """Share of training that is over."""
        return self._told("progress", "progress=i / steps, the share of training that is over")

    @property
    def epoch(self) -> ArrayLike:
        """Epochs that are over."""
        return self._told("epoch", "epoch=i // steps_per_epoch, the number of epochs that are over")

    def devices(self) -> int:
        """Over how many a batch is spread in per-device code; 1 otherwise."""
        return 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)

    def features_size(self) -> int:
        """d of the site "features", [B, d]. Raises ValueError for features of another form."""
        shape = self.site_shapes["features"]
        if len(shape) != 2:
            raise ValueError(f"{self.name} needs features [B, d], got {shape}. Put the site 'features' after the pooling.")
        return shape[1]

    def begun(self, start: ArrayLike) -> jax.Array:
        """[] bool: whether the share `start` of training is over. A start of 0 has no need of `progress`."""
        at_once = not is_traced(start) and np.all(np.asarray(start) <= 0)
        return jnp.bool_(True) if at_once else reached(self.progress, start)

    def epoch_length(self) -> int:
        """Steps of an epoch. Raises ValueError if nobody said how many there are."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        if self.num_examples is None:
            raise ValueError(
                f"{self.name or 'this method'} needs the length of an epoch, got none. Pass objective(..., steps_per_epoch=n)."
            )
        assert self.batch_size is not None
        return max(1, self.num_examples // (self.batch_size * self.devices()))

    def epoch_begins(self) -> jax.Array:
        """[] bool: whether this is the first step of an epoch. Made of the step alone, hence one for all seeds that are vmapped."""
        return jnp.asarray(self.step, jnp.int32) % self.epoch_length() == 0

    def _told(self, name: str, how: str) -> ArrayLike:
        if (value := getattr(self.where, name)) is None:
            raise ValueError(f"{self.name or 'this method'} needs {name!r}, got none. Pass {how}.")
        return value


@dataclasses.dataclass(frozen=True)
class Rest:
    """The rest of the pass from a link's site: later links that only compute are in it, later links that search are not."""

    _run: Callable[[jax.Array, jax.Array | None, Mapping[str, Any]], tuple[jax.Array, Flow]]
    _take: Callable[[jax.Array], "Rest"] | None = None

    def __call__(self, value: jax.Array) -> jax.Array:
        """Losses [B] of the value at this site [B, ...]."""
        return self._run(value, None, {})[0]

    def flow(self, value: jax.Array, key: jax.Array | None = None, **other: Any) -> tuple[jax.Array, Flow]:
        """(losses [B], the flow at the end), which has the logits in its trace. `key` gives another random draw; `other` are fields of
        the flow for a value that is not of this batch's samples (labels, targets, index, extra)."""
        return self._run(value, key, other)

    def take(self, rows: jax.Array) -> "Rest":
        """The rest for some samples only, `rows` [n] of the batch: of values [n, ...]. What links left in `extra` is not in it."""
        return self._take(rows)


class Perturbation(NamedTuple):
    """One link: at `site`, `apply(flow, rest, state, context) -> (flow, state, metrics)`."""

    site: str  # a site of the model, "last_stage", or one of TAIL
    init: Callable[[Context], Any]
    apply: Callable[[Flow, Rest, Any, Context], tuple[Flow, Any, dict[str, jax.Array]]]
    search: bool = False  # reruns the rest of the pass: left out of the rest of earlier links, so that costs add up
    needs: tuple[str, ...] = ()  # sites, "head", "cosine", "class_counts", "domains", "index": checked before training
    name: str = ""  # of the method it belongs to, for metrics and messages; set by @method
    reads_labels: bool = False  # puts the label into the logits: what comes after takes its class statistics from those before
    shared: bool = False  # links with one `init` have one state, each as the link before left it (sites up to the loss)


Chain = tuple[Perturbation, ...]


def chain(*methods: Perturbation | tuple) -> Chain:
    """Composes perturbations: links act in the order of the line, those at one site in the order given.

    >>> import perturbjax as pj
    >>> [link.site for link in pj.chain(pj.lpl(), pj.mixup())]
    ['logits', 'input']
    """
    links: list[Perturbation] = []
    for made in methods:
        if isinstance(made, Perturbation):
            links.append(made)
        elif isinstance(made, tuple) and not hasattr(made, "update"):
            links.extend(chain(*made))
        else:
            raise ValueError(
                f"chain needs perturbations of the loss, got {type(made).__name__}. "
                "Gradient and parameter links belong to the optimiser: optax.chain(link, optax.sgd(0.1))."
            )
    return tuple(links)


def ce() -> Chain:
    """Plain cross entropy: the empty chain."""
    return ()


def reached(progress: ArrayLike, start: ArrayLike) -> jax.Array:
    """Whether the share `progress` of a run has come to `start`: epoch 160 of 200 has begun at 0.8, whatever rounding makes of 160/200."""
    progress = number(progress)
    return progress >= jnp.asarray(start, progress.dtype) - CLOSE


def clean_logits(flow: Flow, logits: jax.Array) -> jax.Array:
    """The logits [B, C] of the clean pass, which statistics of the classes are taken from: those that a link before, which searches or
    knows the label, has left in the flow, or else `logits`."""
    if CLEAN not in flow.extra or flow.extra[CLEAN][1].shape != logits.shape:
        return logits
    known, clean = flow.extra[CLEAN]
    return jnp.where(known, clean.astype(logits.dtype), logits)


def searched_from(flow: Flow, logits: jax.Array, *, searched: ArrayLike = True) -> Flow:
    """The flow with the logits [B, C] of a pass that was clean for later links' `clean_logits`; those that an earlier link has left stay.

    What a link returns whose search began with such a pass (a pass calls it before links that read labels). searched: whether it acts in this
    step.
    """
    known, before = flow.extra.get(CLEAN, (False, logits))
    done = jnp.asarray(searched) | (known if before.shape == logits.shape else False)
    clean = jax.lax.stop_gradient(clean_logits(flow, logits))
    return flow._replace(extra={**flow.extra, CLEAN: (done, clean)})


def counted_samples(flow: Flow) -> jax.Array:
    """[B] bool: which samples are no padding, whatever part of the batch `weights` chooses (one class's, for its gradient)."""
    known = flow.extra.get(COUNTED)
    fits = known is not None and known.shape == flow.labels.shape  # not after a link has changed B
    return known if fits else jnp.ones(flow.labels.shape, bool)


def per_sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample [B], by its position in the data set: the same draw on any number of devices."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
