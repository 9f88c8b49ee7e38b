"""The training loop: calls of the one jitted step, evaluation after epochs, checkpoints, and what is reported of a run."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from perturbjax.analysis.metrics import ClassCounts
from perturbjax.chains import split_methods
from perturbjax.checks import check_number
from perturbjax.data import Dataset, evaluation_batches
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.devices import Devices, from_host, to_host
from perturbjax.training.diagnose import Trouble, explain
from perturbjax.training.feed import Call, Feed, call_length, same_arrays, stacked, streams
from perturbjax.training.folder import RunFolder, keep_model
from perturbjax.training.history import History, every_epoch
from perturbjax.training.interrupt import Interrupted, on_request
from perturbjax.training.step import (
    Recipe,
    TrainState,
    as_arrays,
    compiled_logits,
    compiled_plain_losses,
    compiled_step,
    init_state,
    sample_data,
)

EVALUATION_BATCH = 512
CHECKPOINT_SECONDS = 60.0
PENDING = 50  # calls whose metrics may wait on the device


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the runs that `fit_many` trains."""

    dataset: Dataset
    numbers: dict
    """{"method", "learning_rate", "momentum", "weight_decay"}."""
    seed: int
    name: str = ""
    """In the log, beside the seed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train, as far as it changes no result (beyond rounding)."""

    devices: Devices = dataclasses.field(default_factory=Devices)
    """See there: one device under jit if not given."""
    steps_per_call: int | None = None
    """Steps in one device call; None: 1 on CPU (a loop around convolutions is slow there) and for streamed images, 100 elsewhere."""
    stream: bool | None = None
    """Images stay on the host and are sent batch by batch; None: if they are a memory map or too large for the device."""
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    """At least so long between two checkpoints (several processes: epochs' ends only)."""
    log_every: int = 0
    """Steps between two lines of the log within an epoch; 0: a line per epoch."""
    test_every: int = 1
    """Epochs between two evaluations on the test images; the last epoch always ends with one."""
    on_line: Callable[[dict], None] | None = None
    """Called with every line of the log."""
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    """Is given what a person should know: where a run goes on, a damaged checkpoint."""

    def __post_init__(self):
        check_number("Options", low=0, log_every=self.log_every)
        check_number("Options", low=1, test_every=self.test_every)


@dataclasses.dataclass
class Progress:
    """How far the runs are, beside their state: what a checkpoint keeps as JSON. Lists have one entry per run."""

    step: int
    accuracy: list[list[float]]
    """Test accuracy after each of the epochs `tested`."""
    loss: list[list[float]]
    """Mean training loss of each epoch."""
    metrics: list[dict[str, float]]
    """The links' metrics, averaged over the last whole epoch."""
    best: list[dict[str, float]]
    """The epoch of the highest test accuracy so far, counted from 1, and that accuracy."""
    epoch_sums: list[dict[str, float]]
    """Sums over the steps of the present epoch."""
    line_sums: list[dict[str, float]]
    """Sums over the steps since the last line of the log."""
    seconds: float = 0.0
    log_size: int = 0
    tested: list[int] = dataclasses.field(default_factory=list)
    """Epochs, counted from 1, that ended with an evaluation."""
    balanced_accuracy: list[list[float | None]] = dataclasses.field(default_factory=list)
    """Mean of the classes' test accuracies, where `accuracy` is; None where a version without it tested."""
    macro_f1: list[list[float | None]] = dataclasses.field(default_factory=list)
    """Mean of the classes' F1, likewise."""

    def of(self, s: int) -> dict:
        """The progress of one of the runs alone, as a checkpoint keeps it; whoever writes its log sets log_size."""
        fields = dataclasses.asdict(self)
        shared = {"step": self.step, "seconds": self.seconds / len(self.accuracy), "log_size": 0, "tested": self.tested}
        return {name: shared[name] if name in shared else [own[s]] for name, own in fields.items()}

    @classmethod
    def start(cls, runs: int) -> "Progress":
        """Before the first step."""
        empty = lambda of: [of() for _ in range(runs)]
        books = dict(balanced_accuracy=empty(list), macro_f1=empty(list))
        return cls(0, empty(list), empty(list), empty(dict), empty(dict), empty(dict), empty(dict), **books)


def fit(
    recipe: Recipe,
    dataset: Dataset,
    numbers: dict,
    seed: int,
    *,
    on_epoch: Callable[[int, dict], None] | None = None,
    folder: RunFolder | None = None,
    options: Options | None = None,
) -> History:
    """Trains one method with one seed.

    Args:
      recipe: structure; numbers: {"method", "learning_rate", "momentum", "weight_decay"}.
      dataset: trained on its training part, evaluated on its test part after each epoch (`Options.test_every`).
      seed: of initialisation, batch order, augmentation and every draw. Methods with the same seed see the same batches.
      on_epoch: called with (epoch, {"loss", "accuracy", ...}) after each epoch; without "accuracy" if it ends without a test.
      folder: where log and checkpoints go; a run that is begun there goes on, bit for bit as if it had not been interrupted.
      options: devices, streaming, checkpoints.

    Raises:
      FloatingPointError: the loss became nan, infinite or huge; names the step, and the link and the value that started it.
      Interrupted: SIGTERM or Ctrl-C came; with a folder the state is saved.
      CheckpointNotWritten: the disk is full, or may not be written.
      ValueError: settings that can't be (before anything compiles).
    """
    return fit_many(recipe, [Run(dataset, numbers, seed)], on_epoch=on_epoch, folder=folder, options=options)[0]


def fit_many(
    recipe: Recipe,
    runs: Sequence[Run],
    *,
    on_epoch: Callable[[int, dict], None] | None = None,
    folder: RunFolder | None = None,
    options: Options | None = None,
) -> list[History]:
    """Trains runs of one recipe side by side, vmapped: equal to `fit` on each, to rounding. One run is not vmapped.

    Worth it on GPU and TPU, where one small network leaves most of the device idle; on CPU train them in turn.
    `on_epoch` gets the mean over the runs. The rest is as in `fit`.
    """
    options = options or Options()
    options.devices.check_batch(recipe.batch_size)
    sizes = {(len(r.dataset.train_labels), *r.dataset.image_shape) for r in runs}
    if len(sizes) != 1:
        raise ValueError(
            f"fit_many needs runs on training sets of one size, got {sorted(sizes)}. Train them one by one with fit."
        )
    return _Training(recipe, runs, options, folder, on_epoch).run()


class _Training:
    """The loop's working state: what `fit_many` would otherwise pass around."""

    def __init__(self, recipe, runs, options, folder, on_epoch):
        self.recipe, self.runs, self.options, self.folder, self.on_epoch = recipe, runs, options, folder, on_epoch
        self.devices, self.many = options.devices, len(runs) > 1
        datasets = [r.dataset for r in runs]
        streamed = streams(datasets[0], options.stream, copies=1 if same_arrays(datasets) else len(runs))
        self.feed = Feed(
            recipe, datasets, [r.seed for r in runs], self.devices,
            call_length(options.steps_per_call, streamed), streamed, self.many,
        )  # fmt: skip
        states = [init_state(recipe, r.numbers, sample_data(r.dataset), r.seed) for r in runs]
        self.start = stacked(states)._replace(step=states[0].step) if self.many else states[0]
        self.data = self.feed.data()
        numbers = [as_arrays(r.numbers) for r in runs]
        self.numbers = self.devices.replicate(stacked(numbers) if self.many else numbers[0])
        vmapped = ("shared" if self.feed.shared else "own") if self.many else None
        self.step = compiled_step(recipe, self.devices, vmapped)
        self.progress = Progress.start(len(runs))
        tested = {id(d.test_images): d.test_images for d in datasets}  # those of all seeds are often one array
        placed = tested if streamed else {key: jnp.asarray(images) for key, images in tested.items()}
        self.test_images = [placed[id(d.test_images)] for d in datasets]

    def run(self) -> list[History]:
        with contextlib.ExitStack() as stack:
            checkpoints = None
            if self.folder is not None:
                checkpoints = stack.enter_context(Checkpoints(self.folder.checkpoints))
            wish = stack.enter_context(on_request())
            host = self._resume(checkpoints)
            state = self.devices.replicate(from_host(host, self.start))
            state = self._train(state, host, checkpoints, wish)
            self._stop_if_asked(checkpoints, wish)  # what came during the last evaluation
            histories = self._histories(state)
            self._stop_if_asked(checkpoints, wish)
            return histories

    def _resume(self, checkpoints: Checkpoints | None) -> TrainState:
        """The state to go on from, on the host; sets `progress` and cuts the log to it."""
        host = to_host(self.start)
        found = None if checkpoints is None else checkpoints.restore(host, self.options.say)
        if found is not None:
            step, host, progress = found
            progress.pop("format")
            progress.setdefault("tested", every_epoch(progress["accuracy"][0]))
            for name in ("balanced_accuracy", "macro_f1"):  # checkpoints of earlier versions
                progress.setdefault(name, [[None] * len(own) for own in progress["accuracy"]])
            self.progress = Progress(**progress)
            if not self.options.log_every:  # lines that are switched on later begin there
                self.progress.line_sums = [{} for _ in self.runs]
            self.options.say(f"{self.folder.path}: goes on after step {step} of {self.recipe.total_steps}.")
            if self.folder.log_size < self.progress.log_size:
                self.options.say(f"{self.folder.path}: lines of the log are missing; the numbers are not affected.")
        if self.folder is not None:
            self.folder.cut_log(self.progress.log_size)
            if jax.process_index() == 0:
                keep_model(self.folder.path, self.recipe.model)
        return host

    def _train(self, state: Any, good: TrainState, checkpoints: Checkpoints | None, wish) -> Any:
        """All steps that are left. `good` is the state on the host from which a divergence is replayed."""
        saved, pending = time.monotonic(), []
        self._compile(state)
        began = time.perf_counter()
        with contextlib.closing(self.feed.calls(self.progress.step)) as calls:
            for call in calls:
                state, found, _ = self.step(state, self.numbers, self.data, call.index, call.images)
                pending.append((call, found))
                late = checkpoints is not None and time.monotonic() - saved >= self.options.checkpoint_seconds
                # Several processes go on together: what only one of them knows must not decide who stops here.
                asked = jax.process_count() == 1 and (late or wish.number)
                if not (call.ends_epoch or len(pending) == PENDING or asked):
                    continue
                due, stop = self._agree(late, call.ends_epoch, wish.number)
                trouble, lines = self._absorb(pending)
                pending = []
                self.progress.seconds += time.perf_counter() - began
                if trouble is not None:
                    raise FloatingPointError(self._explained(trouble, good, checkpoints))
                if call.ends_epoch:
                    lines += self._end_epoch(state)
                self._log(lines)
                if checkpoints is not None and (due or stop):
                    self._save(checkpoints, state, good)
                    saved = time.monotonic()
                if stop:
                    raise Interrupted(self._goodbye(checkpoints), stop)
                if call.ends_epoch:
                    host = to_host(self.devices.first(state))
                    self._check_finite(host, good, checkpoints)
                    good = host
                began = time.perf_counter()
        if checkpoints is not None:
            self._save(checkpoints, state, good)
        return state

    def _stop_if_asked(self, checkpoints: Checkpoints | None, wish) -> None:
        """Raises Interrupted for a signal that came after the last step: the caller has more to do, and was asked to stop, too."""
        _, stop = self._agree(False, True, wish.number)
        if stop:
            raise Interrupted(self._goodbye(checkpoints), stop)

    def _compile(self, state: Any) -> None:
        """Compiles for the sizes of call that will occur, before the clock starts."""
        per_epoch, per_call = self.recipe.steps_per_epoch, self.feed.steps_per_call
        images = self.runs[0].dataset.train_images
        done = _COMPILED.setdefault((self.step, len(self.runs), images.shape, images.dtype.str, self.feed.streamed), set())
        for steps in {min(per_call, per_epoch), per_epoch % per_call} - {0} - done:
            call = self.feed.example(steps)
            # On a copy: the step gives its state's buffers away.
            jax.block_until_ready(self.step(jax.tree.map(jnp.copy, state), self.numbers, self.data, call.index, call.images))
            done.add(steps)

    def _agree(self, late: bool, ends_epoch: bool, stop: int) -> tuple[bool, int]:
        """(whether to save, the signal to stop for): what all processes do."""
        if jax.process_count() == 1:
            return late, stop
        return ends_epoch, int(np.max(multihost_utils.process_allgather(np.array(stop))))

    def _absorb(self, pending: list[tuple[Call, dict]]) -> tuple[Trouble | None, list[dict]]:
        """Adds the steps' metrics to the sums, in order: (the first bad loss, or None; lines for the log)."""
        lines, every = [], self.options.log_every
        for call, found in pending:
            values = {name: np.atleast_2d(np.asarray(x)) for name, x in jax.device_get(found).items()}  # [S, steps]
            for i in range(call.steps):
                for s in range(len(self.runs)):
                    trouble = Trouble.of(float(values["loss"][s, i]), call.first + i, s, self.recipe.num_classes)
                    if trouble is not None:
                        return trouble, lines
                    for sums in (self.progress.epoch_sums[s], *([self.progress.line_sums[s]] if every else ())):
                        for name, x in values.items():
                            # One after the other in float64: the sum is the same wherever a run was interrupted.
                            sums[name] = sums.get(name, 0.0) + float(x[s, i])
                        sums["steps"] = sums.get("steps", 0) + 1
                self.progress.step += 1
                if every and self.progress.step % every == 0:
                    lines += [self._line(s, mean(self.progress.line_sums[s])) for s in range(len(self.runs))]
                    self.progress.line_sums = [{} for _ in self.runs]
        return None, lines

    def _end_epoch(self, state: Any) -> list[dict]:
        """Tests, if it is time to, and closes the epoch's books; its lines for the log."""
        progress, lines, means = self.progress, [], []
        host = self.devices.first(state)
        epoch = progress.step // self.recipe.steps_per_epoch
        tests = epoch % self.options.test_every == 0 or epoch == self.recipe.epochs
        if tests:
            progress.tested.append(epoch)
        for s in range(len(self.runs)):
            found = mean(progress.epoch_sums[s])
            progress.loss[s].append(found["loss"])
            progress.metrics[s] = {name: x for name, x in found.items() if name != "loss"}
            means.append(found | (self._test(host, s, epoch) if tests else {}))
            lines.append(self._line(s, {"epoch": epoch, **means[-1]}))
        progress.epoch_sums = [{} for _ in self.runs]
        if self.on_epoch is not None:
            average = {name: float(np.mean([m[name] for m in means])) for name in means[0]}
            self.on_epoch(epoch - 1, average)
        return lines

    def _test(self, state: Any, s: int, epoch: int) -> dict[str, float]:
        """Accuracy, balanced accuracy and macro F1 on the test set of one of the runs, entered into its books."""
        labels, classes = self.runs[s].dataset.test_labels, self._predict(state, s, of=predicted_classes)
        scores = ClassCounts.of(classes, labels, self.recipe.num_classes).summary()
        for name, value in scores.items():
            getattr(self.progress, name)[s].append(value)
        if scores["accuracy"] > self.progress.best[s].get("accuracy", -1.0):
            self.progress.best[s] = {"epoch": epoch, "accuracy": scores["accuracy"]}
        return scores

    def _line(self, s: int, values: dict) -> dict:
        run = self.runs[s]
        which = {"method": run.name} if run.name else {}
        return {**which, "seed": run.seed, "step": self.progress.step, **values}

    def _log(self, lines: list[dict]) -> None:
        if self.folder is not None and lines:
            self.folder.append(lines)
            self.progress.log_size = self.folder.log_size
        for line in lines if self.options.on_line is not None else ():
            self.options.on_line(line)

    def _save(self, checkpoints: Checkpoints, state: Any, good: TrainState) -> None:
        host = to_host(self.devices.first(state))
        # The loss of a step tells of the updates before it, not of its own.
        self._check_finite(host, good, checkpoints)
        # A copy, since the books go on while this is being written.
        progress = json.loads(json.dumps(dataclasses.asdict(self.progress)))
        checkpoints.save(self.progress.step, host, progress)

    def _check_finite(self, host: TrainState, good: TrainState, checkpoints: Checkpoints | None) -> None:
        """Raises FloatingPointError if an update has made parameters nan or infinite."""
        for s in range(len(self.runs)):
            own = jax.tree.map(lambda x, s=s: x[s] if self.many else x, host.params)
            if not all(np.isfinite(x).all() for x in jax.tree.leaves(own)):
                trouble = Trouble(float("nan"), self.progress.step, s)
                raise FloatingPointError(self._explained(trouble, good, checkpoints))

    def _goodbye(self, checkpoints: Checkpoints | None) -> str:
        at = f"step {self.progress.step} of {self.recipe.total_steps}"
        if checkpoints is None:
            return f"stopped at {at}: nothing was saved, since the run has no folder."
        checkpoints.wait()
        return f"stopped at {at}, saved in {self.folder.path}. The same command goes on from there."

    def _memorised(self, state: Any, s: int) -> float | None:
        dataset = self.runs[s].dataset
        rows = np.flatnonzero(dataset.flipped)
        if not rows.size:
            return None
        fitted = self._predict(state, s, dataset.train_images[rows], of=predicted_classes)
        return float(np.mean(fitted == dataset.train_labels[rows]))

    def _predict(self, state: Any, s: int, images: np.ndarray | None = None, *, of: Callable | None = None) -> np.ndarray:
        """Logits of one run for images, by default its test images; or what else `of` finds there."""
        own = (lambda tree: jax.tree.map(lambda x: x[s], tree)) if self.many else (lambda tree: tree)
        params, stats = own(state.params), own(state.stats)
        if jax.process_count() > 1:  # every process evaluates on a device of its own
            params, stats = to_host((params, stats))
        return (of or predict)(self.recipe.model, params, stats, self.test_images[s] if images is None else images)

    def _explained(self, trouble: Trouble, good: TrainState, checkpoints: Checkpoints | None) -> str:
        run = self.runs[trouble.run]
        state = self._own(good, trouble.run)
        found = explain(self.recipe, run.dataset, run.numbers, run.seed, state, trouble.step, self.feed.streamed)
        if checkpoints is not None:
            checkpoints.wait()
        kept = (
            ""
            if checkpoints is None or checkpoints.latest is None
            else f" The checkpoint of step {checkpoints.latest} is kept."
        )
        epoch = min(trouble.step // self.recipe.steps_per_epoch + 1, self.recipe.epochs)
        named = f"{run.name}, " if run.name else ""
        at = f"step {trouble.step + 1} ({named}epoch {epoch}, seed {run.seed})"
        return f"fit needs finite losses, got a mean of {trouble.loss:.3g} at {at}. {found}{kept}"

    def _own(self, host: TrainState, s: int) -> TrainState:
        """One run's state on a single device, from the runs' state on the host."""
        state = from_host(host, self.start)
        if self.many:
            state = jax.tree.map(lambda x: x[s], state._replace(step=None))._replace(step=state.step)
        return jax.tree.map(jnp.array, state)

    def _histories(self, state: Any) -> list[History]:
        progress, recipe, many = self.progress, self.recipe, len(self.runs)
        last = self.devices.first(state)
        host, histories = to_host(last), []
        for s, run in enumerate(self.runs):
            own, metrics = self._own(host, s), progress.metrics[s]
            histories.append(
                History(
                    accuracy=progress.accuracy[s],
                    balanced_accuracy=progress.balanced_accuracy[s],
                    macro_f1=progress.macro_f1[s],
                    loss=progress.loss[s],
                    logits=self._predict(last, s),
                    seconds=progress.seconds / many,
                    gradient_evaluations=1 + extra_gradients(own.opt_state) / recipe.total_steps,
                    inner_evaluations=sum(v for k, v in metrics.items() if k.endswith("inner_evaluations")),
                    metrics=metrics,
                    losses=training_losses(recipe, own, run.numbers, run.dataset, run.seed, streamed=self.feed.streamed),
                    memorised=self._memorised(last, s),
                    examples_per_second=recipe.total_steps * recipe.batch_size * many / max(progress.seconds, 1e-9),
                    peak_memory=peak_memory(),
                    state=own,
                    progress=progress.of(s),
                    tested=list(progress.tested),
                )
            )
        return histories


_COMPILED: dict[tuple, set[int]] = {}


def mean(sums: dict[str, float]) -> dict[str, float]:
    """Sums over "steps" steps as means, the loss first."""
    return {name: x / sums["steps"] for name, x in sums.items() if name != "steps"}


def predict(model, params, stats, images: np.ndarray, *, batch_size: int = EVALUATION_BATCH) -> np.ndarray:
    """Logits [N, C] of images [N, H, W, channels] in evaluation mode; the last batch is padded, which changes no number."""
    return _evaluated(model, params, stats, images, batch_size, lambda logits: logits)


def predicted_classes(model, params, stats, images: np.ndarray, *, batch_size: int = EVALUATION_BATCH) -> np.ndarray:
    """[N], the class of the largest of `predict`'s logits, -1 where one is nan; found on the device, which the logits don't leave."""
    return _evaluated(model, params, stats, images, batch_size, _largest)


def _evaluated(model, params, stats, images, batch_size, of):
    run = compiled_logits(model)  # one program for logits and classes, so that both are of the same numbers
    index, mask = evaluation_batches(len(images), min(batch_size, len(images)))
    found = [of(run(params, stats, jnp.asarray(images[rows]))) for rows in index]
    return np.concatenate(jax.device_get(found))[np.asarray(mask).reshape(-1).astype(bool)]


@jax.jit
def _largest(logits: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))


def extra_gradients(opt_state: optax.OptState) -> int:
    """Gradients that optimiser links asked of `grad_fn` in all: the sum of their states' `evaluations`."""
    return int(sum(np.asarray(v) for _, v in optax.tree_utils.tree_get_all_with_path(opt_state, "evaluations")))


def peak_memory() -> int:
    """The most bytes in use so far: on the first device where it tells, else of this process; 0 where nobody tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if found := stats.get("peak_bytes_in_use"):
        return int(found)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def training_losses(
    recipe: Recipe, state: TrainState, numbers: dict, dataset: Dataset, seed: int, *, batches: int = 32, streamed: bool = False
):
    """(plain losses, perturbed losses, labels) of up to `batches` training batches at this state; None for an empty chain.

    The perturbed ones are what the training step sees, at the last of its replays: one step at a time on copies of the state, on one
    device, which is the program that is there already unless the training had several devices, seeds side by side, or several steps in a
    call.
    """
    if not split_methods(recipe.build(numbers["method"]))[0]:
        return None
    # The plain pass does not depend on the method: one program for all methods of a comparison.
    once = dataclasses.replace(recipe, replays=1, fine_tuning=None)
    plain = compiled_plain_losses(dataclasses.replace(once, build=_no_methods))
    step, on_device = compiled_step(recipe), as_arrays(numbers)
    feed = Feed(once, [dataset], [seed], Devices(), 1, streamed, False)
    data, clean, perturbed, labels = feed.data(), [], [], []
    for call in itertools.islice(feed.calls(0), min(batches, recipe.steps_per_epoch)):
        rows, images = call.index[0], None if call.images is None else call.images[0]
        clean.append(np.asarray(plain(state, data, rows, images)))
        states = state.states
        for _ in range(recipe.replays):
            own = jax.tree.map(jnp.copy, state._replace(states=states))
            after, _, losses = step(own, on_device, data, call.index, call.images)
            states = after.states
        perturbed.append(np.asarray(losses[0]))
        labels.append(dataset.train_labels[np.asarray(rows)])
    return np.concatenate(clean), np.concatenate(perturbed), np.concatenate(labels)


def _no_methods(numbers) -> tuple:
    return ()
