"""The line of variables, and the pass along it: objective.

    x ──► a⁽¹⁾ … a⁽ᴸ⁻¹⁾ ──► u ──► p / y ──► ℓ   ⟶(backward)⟶   h = ∂ℓ/∂u ──► g ──► w
    input  stem, stages, features  logits  prediction, label  loss           logit_gradient   (optax from here on)

`objective` runs the whole line once per training step: at each site the links of that site act on the value in the order of the chain,
then the pass goes on from the perturbed value. A link that searches (PGD) gets `rest`, the remainder of the pass from its own site, and
reruns only that.

This is the only file that knows the whole line; it knows sites and links (`perturbjax.link`), and no method.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from perturbjax.checks import check_index, check_labels, check_number, is_traced
from perturbjax.classes import AxisName, wide
from perturbjax.label_form import multi_hot, trouble
from perturbjax.line import Line, line
from perturbjax.link import COUNTED, TAIL, Chain, Context, Flow, Perturbation, Rest, Where, chain, searched_from

# Folded into the step's key for the model's own random draws; links fold in their position, which stays far below.
_MODEL_STREAM = 0x6D6F64
_EVALUATIONS = "inner_evaluations"


class Batch(NamedTuple):
    """One batch of training data; the objective fills in what is None."""

    inputs: jax.Array  # [B, ...]
    labels: jax.Array  # [B] int32 in 0..C-1; others are an error outside jit and make the loss nan inside
    targets: jax.Array | None = None  # [B, C]; None: one-hot labels
    weights: jax.Array | None = None  # [B]; None: ones; a sample with weight 0 is padding, whose label may be any
    index: jax.Array | None = None  # [B]; None: 0..B-1, an error for links that keep tables by sample
    side: Mapping[str, jax.Array] = {}


def batch(
    inputs: jax.Array, labels: jax.Array, *, num_classes: int | None = None, num_examples: int | None = None, **fields: Any
) -> Batch:
    """A Batch, with its labels and its positions in the data set checked where they can be seen (outside jit).

    Raises ValueError for labels outside 0..C-1 if `num_classes` is given, for an `index` outside 0..N-1 if `num_examples` is.
    """
    if num_classes is not None:
        check_labels("batch", labels, num_classes)
    if num_examples is not None and fields.get("index") is not None:
        check_index("batch", fields["index"], num_examples)
    return Batch(jnp.asarray(inputs), jnp.asarray(labels), **fields)


class Output(NamedTuple):
    """What a pass returns beside the loss."""

    states: tuple  # of the links, for the next step
    stats: Any  # new BatchNorm statistics
    metrics: dict[str, jax.Array]  # "method/name" -> scalar; of two methods of one name "method/name@site"
    losses: jax.Array  # [B] with weights and penalty, whose mean is the loss
    logits: jax.Array  # [B, C] after the links


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model and a chain as one loss function, for `jax.value_and_grad(objective, has_aux=True)`. Made by `objective`."""

    line: Line
    links: Chain
    context: Context

    def init(self, variables: Any, inputs: jax.Array, *, stats: Any = None) -> tuple:
        """States of all links, for a batch like `inputs` [B, ...]: shape and dtype matter; numbers, if there are any, are only checked."""
        shapes, options = {"input": tuple(inputs.shape)}, {}
        value: Any = jax.ShapeDtypeStruct(inputs.shape, jax.dtypes.canonicalize_dtype(inputs.dtype))
        if self.line.side is not None:
            options = {"side": jax.eval_shape(self.line.side, value)}
        for start, stop in zip(self.line.sites, self.line.sites[1:], strict=False):
            value, _ = jax.eval_shape(
                lambda v, x, s, o, start=start, stop=stop: self.line.slice(v, x, start, stop, stats=s, train=False, key=None, **o),
                variables, value, stats, options,
            )  # fmt: skip
            shapes[stop] = tuple(value.shape)
        if shapes["logits"] != (inputs.shape[0], self.context.num_classes):
            raise ValueError(
                f"objective needs logits [B, num_classes] = {(inputs.shape[0], self.context.num_classes)}, "
                f"got {shapes['logits']} from the model. Set num_classes to the number of the model's outputs."
            )
        for link in self.links:
            for site in (link.site, *link.needs):
                if site in shapes and shapes[site][:1] != (inputs.shape[0],):
                    raise ValueError(
                        f"{link.name or 'link'} needs one row per sample at the site {site!r}, [B, ...] with B = {inputs.shape[0]}, "
                        f"got {shapes[site]}. Let the model return value.reshape(B, ...) there and shape it back behind the site, "
                        "or name another site."
                    )
        known = (
            isinstance(inputs, np.ndarray | jax.Array)
            and not is_traced(inputs)
            and getattr(inputs, "is_fully_addressable", True)
        )
        context = self.context._replace(
            site_shapes=shapes, inputs=inputs if known else None, batch_size=inputs.shape[0], level=self.line.level,
            float_type=_float_type(variables, inputs),
        )  # fmt: skip
        states = [link.init(context._replace(site=link.site, name=link.name)) for link in self.links]
        return tuple(state if _owner(self.links, i) == i else () for i, state in enumerate(states))

    def __call__(
        self,
        variables: Any,
        states: tuple,
        data: Batch,
        *,
        key: jax.Array | None = None,
        step: ArrayLike | None = None,
        progress: ArrayLike | None = None,
        epoch: ArrayLike | None = None,
        stats: Any = None,
        weights: ArrayLike | None = None,
        validation: Any = None,
        train: bool = True,
    ) -> tuple[jax.Array, Output]:
        """(mean over the batch of weight · loss + penalty, Output).

        Args:
          variables: what is differentiated (the "params" of a Flax model).
          states: of the links, from `init` or the last Output.
          data: a Batch.
          key: typed PRNG key of this step; the same key gives the same masks and mixing pairs. None: key 0. What links draw for a
            sample follows its `index`; what the model draws (its dropout, stochastic depth) its place in the batch, and with
            `axis_name` its device.
          step, progress, epoch: where training stands (numbers, may be traced): optimiser steps taken, their share of all steps, and
            epochs that are over. For schedules and statistics by epoch; a method that follows one that is None raises ValueError.
          stats: BatchNorm statistics.
          weights: [B], multiplied into the sample weights (class- or domain-wise gradients of one batch).
          validation: a clean batch for links that learn from one.
          train: False runs BatchNorm and the model's dropout in evaluation mode.
        """
        inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
        count, num_classes = inputs.shape[0], self.context.num_classes
        self._check_shapes(data, weights)
        self._check_labels(labels, data.weights)
        if labels.dtype.itemsize < 4:  # one-hot rows of 300 classes need numbers that go beyond uint8
            labels = labels.astype(jnp.int32)
        dtype = _float_type(variables, inputs)
        targets = jax.nn.one_hot(labels, num_classes, dtype=dtype) if data.targets is None else data.targets
        # In targets and penalty, where it changes no bit of a right label's gradient; a factor of the losses would.
        wrong, nan = self._no_class(labels, data.weights), jnp.asarray(jnp.nan, dtype)
        weight = lambda given: jnp.ones([count], dtype) if given is None else jnp.asarray(given, dtype)
        flow = Flow(
            value=inputs,
            labels=labels,
            targets=jnp.where(wrong[:, None], nan, jnp.asarray(targets, dtype)),
            weights=weight(data.weights) * weight(weights),
            index=jnp.arange(count, dtype=jnp.int32) if data.index is None else data.index,
            side=data.side if self.line.side is None else {**data.side, **self.line.side(inputs)},
            trace={},
            extra={} if data.weights is None else {COUNTED: jnp.asarray(data.weights) != 0},
            penalty=self._outside(data.index, count, dtype) + jnp.where(wrong, nan, jnp.zeros([], dtype)),
            stats=stats,
        )
        context = self.context._replace(
            batch_size=count, level=self.line.level, where=Where(step, progress, epoch),
            key=jax.random.key(0) if key is None else key, variables=variables, validation=validation, float_type=dtype,
            head=None if self.line.head is None else functools.partial(self.line.head, variables),
        )  # fmt: skip
        flow, states, metrics = _Pass(self.line, self.links, tuple(states), context, train).run(flow)
        losses = flow.weights.astype(flow.value.dtype) * flow.value + flow.penalty.astype(flow.value.dtype)
        return losses.mean(), Output(states, flow.stats, metrics, losses, flow.trace["logits"])

    def _check_shapes(self, data: Batch, weights: ArrayLike | None) -> None:
        """Raises ValueError for a batch that is not one of B samples: [B, 1] against [B] would broadcast to B·B losses without a word."""
        count = np.shape(data.inputs)[0]
        fields = {name: getattr(data, name) for name in ("labels", "index", "weights", "targets")} | {"weights=": weights}
        for name, value in fields.items():
            shape, axes = ((count, self.context.num_classes), "[B, C]") if name == "targets" else ((count,), "[B]")
            if value is None or np.shape(value) == shape:
                continue
            how = "Give one entry for each sample."
            if name != "targets" and np.shape(value) == (count, 1):
                how = f"Write {name.strip('=')}[:, 0]."
            if name == "labels" and np.shape(value) == (count, self.context.num_classes):
                how = "Write labels.argmax(1), and the rows themselves as targets=."
                if not is_traced(value) and multi_hot(np.asarray(value)):
                    how = trouble(value)[1]
            raise ValueError(f"objective needs {name} {axes} = {shape}, got {np.shape(value)}. {how}")

    def _check_labels(self, labels: jax.Array, weights: ArrayLike | None) -> None:
        """Raises ValueError for labels that are no integers, and for some outside 0..C-1 where they can be seen; those of samples with
        weight 0 are padding."""
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"objective needs integer labels, got {labels.dtype}. Cast them: labels.astype(jnp.int32).")
        if not is_traced((labels, weights)) and labels.is_fully_addressable:
            counted = labels if weights is None else np.where(np.asarray(weights) != 0, np.asarray(labels), 0)
            check_labels("objective", counted, self.context.num_classes)

    def _no_class(self, labels: jax.Array, weights: ArrayLike | None) -> jax.Array:
        """[B] bool: labels outside 0..C-1, which can't be an error in jit. With weight 0 such a sample is padding."""
        outside = (labels < 0) | (labels >= self.context.num_classes)
        return outside if weights is None else outside & (jnp.asarray(weights) != 0)

    def _outside(self, index: jax.Array | None, count: int, dtype: Any) -> jax.Array:
        """[B] zeros; nan for positions beyond the tables by sample, if a link keeps any: the loss then tells what can't be an error in jit."""
        keeper = next((link.name or "link" for link in self.links if "index" in link.needs), None)
        if keeper is None:
            return jnp.zeros([count], dtype)
        if index is None:
            raise ValueError(
                f"{keeper} needs each sample's position in the data set, got a batch without index. "
                "Pass pj.batch(x, y, index=positions), positions [B] in 0..num_examples-1."
            )
        rows = self.context.num_examples
        if rows is None:  # then its tables are its own business
            return jnp.zeros([count], dtype)
        if not is_traced(index) and getattr(index, "is_fully_addressable", True):
            check_index(keeper, index, rows)
        return jnp.where((index >= 0) & (index < rows), 0.0, jnp.nan).astype(dtype)


def objective(
    model: Any,
    links: Perturbation | tuple = (),
    *,
    num_classes: int,
    class_counts: ArrayLike | None = None,
    num_examples: int | None = None,
    num_domains: int | None = None,
    axis_name: AxisName = None,
    balanced_from: float | None = None,
    replays: int = 1,
    steps_per_epoch: int | None = None,
) -> Objective:
    """The perturbed loss of a model as one pure function.

    Args:
      model: a `Line`, or anything `line` takes.
      links: what `chain` returns, one perturbation, or () for plain cross entropy.
      num_classes: C.
      class_counts: [C] training samples of each class, for the methods that need them.
      num_examples: size of the training set, for the methods that keep a table by sample.
      num_domains: for domain generalization.
      axis_name: mapped axis of per-device code (pmap, shard_map); None under jit, sharded or not. The model's own random draws are
        independent on every device then.
      balanced_from: share of training after which the batches are class-balanced, for methods that ask for such.
      replays: how often each batch comes in a row, for methods that ask for more than once.
      steps_per_epoch: for the methods that act once an epoch; None: the full batches in num_examples.

    Raises:
      ValueError: an unknown site (lists those there are), class counts missing or of the wrong length, or something else that
        a link needs and this model or call does not give.
    """
    made, links = line(model), chain(links)
    links = tuple(link if link.site in TAIL else link._replace(site=made.site(link.site)) for link in links)
    given = {"index"} | ({"head"} if made.head is not None else set())  # the index is a batch's: checked when that comes
    given |= {"cosine"} if made.scale is not None else set()
    given |= {"class_counts"} if class_counts is not None else set()
    given |= {"domains"} if num_domains is not None else set()
    for link in links:
        for need in link.needs:
            if need not in given and need not in made.sites + TAIL[:-1]:
                how = {
                    "head": "Give pj.line(..., head=lambda variables: (W, b)), or create the model with head='linear'.",
                    "cosine": "Create the model with head='cosine' (--head cosine), or give pj.line(..., scale=s).",
                    "class_counts": "Pass class_counts= (numpy.bincount(labels, minlength=C)).",
                    "domains": "Pass num_domains= and batches with side={'domain': d}, d [B] in 0..D-1 (data with domains in training).",
                    "outputs": "Give the model one more output: create(..., abstain=True), --abstain.",
                }.get(need, f"The model's sites are {', '.join(made.sites)}: cut it there with pj.line.")
                raise ValueError(f"{link.name or 'link'} needs {need!r}, got none. {how}")
        if link.reads_labels and link.site != "logits":
            raise ValueError(
                f"{link.name or 'link'} needs the site 'logits' for reads_labels=True, got {link.site!r}. Leave reads_labels out: nothing "
                "is in the logits yet, or any more."
            )
    check_number("objective", low=1, replays=replays)
    if num_classes < 2:
        raise ValueError(f"objective needs num_classes >= 2, got {num_classes}. With one class there is nothing to learn.")
    if class_counts is not None:
        class_counts = jnp.asarray(class_counts)
        if class_counts.shape != (num_classes,):
            raise ValueError(
                f"objective needs class_counts of shape ({num_classes},), got {class_counts.shape}. "
                "Count with numpy.bincount(labels, minlength=num_classes)."
            )
    context = Context(
        num_classes, class_counts, num_examples, num_domains=num_domains, axis_name=axis_name, balanced_from=balanced_from,
        replays=replays, steps_per_epoch=steps_per_epoch, scale=made.scale,
    )  # fmt: skip
    return Objective(made, links, context)


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One walk down the line, with everything that does not change on the way."""

    line: Line
    links: Chain
    states: tuple
    context: Context
    train: bool

    @property
    def stops(self) -> tuple[str, ...]:
        return self.line.sites + TAIL[:-1]

    def run(self, flow: Flow) -> tuple[Flow, tuple, dict]:
        """The outer pass, which keeps states, statistics and metrics; then the links at the logit gradient."""
        states, reports = list(self.states), []

        def keep(i, state, found):
            states[_owner(self.links, i)] = state
            reports.append((i, found))

        start = flow
        at_logits = self._walk(start, 0, 0, self.context.key, keep, stop=len(self.line.sites), states=states)
        backward = any(link.site == "logit_gradient" for link in self.links)
        # What comes back along the tail is then finished, as without such links, before anything is added to it (see _leave).
        tail = at_logits._replace(value=jax.lax.optimization_barrier(at_logits.value)) if backward else at_logits
        flow = self._walk(tail, len(self.line.sites), 0, self.context.key, keep, enter=True, states=states)
        if backward:
            flow = self._perturb_logit_gradient(start, at_logits, flow, keep)
        return flow, tuple(states), _collected(self.links, reports)

    def _walk(self, flow, start, first_link, key, keep=None, *, stop=None, enter=False, states=None):
        """Runs the flow from stop number `start` on. `keep` takes new states and metrics (None: inside a rest).

        Links of `start` with a number below `first_link` are done already; `enter` moves to `start` from the site before. `states`:
        those that `keep` writes to, so that links that share one see it written; None: as they were before the pass.
        """
        states = self.states if states is None else states
        stops = self.stops[: stop or len(self.stops)]
        for number in range(start, len(stops)):
            if number > start or enter:
                flow = self._enter(flow, stops[number - 1], stops[number], key)
            for i, link in enumerate(self.links):
                begun = number == start and i < first_link
                if link.site != stops[number] or begun or (keep is None and link.search):
                    continue
                if link.reads_labels:
                    flow = searched_from(flow, flow.value)
                own = states[_owner(self.links, i)]
                flow, state, found = link.apply(flow, self._rest(flow, number, i + 1, key), own, self._of(i, key))
                if keep is not None:
                    keep(i, state, found)
            flow = self._leave(flow, stops[number])
        return flow

    def _of(self, i: int, key: jax.Array) -> Context:
        link = self.links[i]
        return self.context._replace(key=jax.random.fold_in(key, i), site=link.site, name=link.name)

    def _rest(self, flow: Flow, number: int, first_link: int, key: jax.Array) -> Rest:
        def run(value, other_key, other):
            begin = flow._replace(value=value, **other)
            end = self._walk(begin, number, first_link, key if other_key is None else other_key)
            return end.value, end

        return Rest(run, lambda rows: self._rest(_taken(flow, rows), number, first_link, key))

    def _enter(self, flow: Flow, before: str, site: str, key: jax.Array) -> Flow:
        """Moves the flow from one site to the next one."""
        if site == "prediction":
            return flow._replace(value=jax.nn.log_softmax(flow.value, axis=-1))
        if site == "label":
            return flow._replace(value=flow.targets.astype(flow.value.dtype))
        if site == "loss":
            return flow._replace(value=-jnp.sum(flow.targets * flow.trace["prediction"], axis=-1))
        model_key = jax.random.fold_in(key, _MODEL_STREAM)
        if self.context.axis_name is not None:  # the model draws for its place in the batch, of which every device has its own
            device = jax.lax.axis_index(self.context.axis_name)
            model_key = jnp.where(device > 0, jax.random.fold_in(model_key, device), model_key)
        if before == "input" and self.line.side is not None:  # of the inputs as the links there left them
            flow = flow._replace(side={**flow.side, **self.line.side(flow.value)})
        options = {} if self.line.side is None else {"side": flow.side}
        value, stats = self.line.slice(
            self.context.variables, flow.value, before, site, stats=flow.stats, train=self.train, key=model_key, **options
        )
        return flow._replace(value=wide(value) if site == "logits" else value, stats=stats)

    def _leave(self, flow: Flow, site: str) -> Flow:
        if site == "logits" or site in TAIL:
            # Keeps what the links here compute out of the loops that XLA fuses before and after, forward and backward: it would
            # round those differently, and a link that is switched off would not be plain training bit for bit.
            flow = flow._replace(value=jax.lax.optimization_barrier(flow.value))
        if site == "label":
            flow = flow._replace(targets=flow.value)
        return flow._replace(trace={**flow.trace, site: flow.value})

    def _pullback(self, start: Flow) -> Callable[[jax.Array], Any]:
        """Of the pass to the logits, links included: cotangents [B, C] -> gradients of the variables, constants outside."""
        variables = jax.lax.stop_gradient(self.context.variables)
        if self.context.axis_name is not None:
            # Under shard_map the gradient of what all devices share comes out summed over them; wanted is this device's own.
            zero = 0 * start.labels.sum()
            variables = jax.tree.map(lambda w: w + zero.astype(w.dtype), variables)

        def logits(variables):
            head = None if self.line.head is None else functools.partial(self.line.head, variables)
            moved = dataclasses.replace(self, context=self.context._replace(variables=variables, head=head))
            end = moved._walk(start, 0, 0, self.context.key, lambda *_: None, stop=len(self.line.sites))
            return end.trace["logits"]

        pull = jax.vjp(logits, variables)[1]
        return lambda cotangents: pull(cotangents)[0]

    def _perturb_logit_gradient(self, start: Flow, at_logits: Flow, end: Flow, keep) -> Flow:
        """Adds h̃ − h to the cotangent of the logits u: ℓ + ⟨δ, u⟩ − sg⟨δ, u⟩ with δ constant, whose value is ℓ exactly."""
        u = at_logits.trace["logits"]

        def total(value):
            moved = at_logits._replace(value=value, trace={**at_logits.trace, "logits": value})
            # With a `keep`, links that search take part too: h is the gradient of the losses as the outer pass has them.
            return self._walk(moved, len(self.line.sites), 0, self.context.key, lambda *_: None, enter=True).value.sum()

        flow = end._replace(value=jax.lax.stop_gradient(jax.grad(total)(jax.lax.stop_gradient(u))))
        before = flow.value
        for i, link in enumerate(self.links):
            if link.site == "logit_gradient":
                none = Rest(lambda value, key, other: (end.value, end))  # the losses don't depend on their own gradient
                context = self._of(i, self.context.key)._replace(pullback=functools.partial(self._pullback, start))
                flow, state, found = link.apply(flow, none, self.states[i], context)
                keep(i, state, found)
        delta = jax.lax.stop_gradient(flow.value - before)
        along = jnp.sum(delta * u, axis=-1)
        return flow._replace(value=end.value + (along - jax.lax.stop_gradient(along)))


def _float_type(variables: Any, inputs: Any) -> Any:
    """float64 if the parameters or the inputs have any (and JAX_ENABLE_X64 is on), else float32."""
    double = any(getattr(x, "dtype", type(x)) in (float, np.float64) for x in jax.tree.leaves((variables, inputs)))
    return jax.dtypes.canonicalize_dtype(np.float64) if double else jnp.float32


def _owner(links: Chain, i: int) -> int:
    """The link whose place in the states holds the state of link i."""
    if not links[i].shared:
        return i
    return next(j for j, other in enumerate(links) if other.shared and other.init is links[i].init)


def _taken(flow: Flow, rows: jax.Array) -> Flow:
    """The flow of some samples only. `extra` may be about the whole batch (mixing partners), so it stays behind."""
    own = lambda tree: jax.tree.map(lambda x: x[rows], tree)
    per_sample = ("value", "labels", "targets", "weights", "index", "side", "trace", "penalty")
    return flow._replace(extra={}, **{name: own(getattr(flow, name)) for name in per_sample})


def _collected(links: Chain, reports: list[tuple[int, Mapping[str, jax.Array]]]) -> dict[str, jax.Array]:
    """The links' metrics as "method/name"; where two methods of one name report the same, "method/name@site", each its own.

    Links that share a state are one method, and the last one speaks for all. Inner evaluations add up under the plain name; where
    several links have some, each one's own are there as well.
    """
    named: dict[str, dict[int, jax.Array]] = {}
    for i, report in reports:
        for key, value in report.items():
            place = i if key == _EVALUATIONS else _owner(links, i)
            named.setdefault(f"{links[i].name}/{key}" if links[i].name else key, {})[place] = value
    metrics: dict[str, jax.Array] = {}
    for name, values in named.items():
        counts = name.split("/")[-1] == _EVALUATIONS
        if counts or len(values) == 1:
            metrics[name] = sum(list(values.values())[1:], start=next(iter(values.values())))
        if len(values) > 1:
            owners = [i if counts else _owner(links, i) for i in range(len(links))]
            sites = ["+".join(links[i].site for i, owner in enumerate(owners) if owner == place) for place in values]
            for number, (site, value) in enumerate(zip(sites, values.values(), strict=True)):
                before = sites[:number].count(site)  # several at one site: "@site", "@site#2", …
                metrics[f"{name}@{site}" + (f"#{before + 1}" if before else "")] = value
    return metrics
