"""What each method's step costs: medians of paired runs in one process, relative to plain cross entropy, beside the ideal cost.

    python experiments/bench.py                                                          # ResNet-20, batch 128, 32 x 32 images
    python experiments/bench.py --methods "la, lpl, lpa(site=stage1)" --model cnn --image-size 16 --json FILE

ideal = (1 + Σ (2T/3)·f) · (1 + extra gradients): f is the share of the net's work after the link's site, by the compiler's count of
floating-point operations; T its inner evaluations; extra gradients a step, on average. quotient = measured / ideal. Three lines more,
for plain cross entropy: "trainer" is a hand-written minimal loop's step time over ours (1 means that the library costs nothing), "data
path" the rate of steps whose images are streamed over that with the data on the device, "checkpoint" the time of one over that of an
epoch of 390 steps (CIFAR-10's).
"""

import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import shared
from perturbjax.data import Dataset
from perturbjax.line import line
from perturbjax.link import Perturbation
from perturbjax.training import Checkpoints, Devices, Recipe, TimedStep, cost_ratios, device_data, init_state, split_methods
from perturbjax.training.checkpoint import dump_json
from perturbjax.training.devices import to_host
from perturbjax.training.feed import Feed
from perturbjax.training.loop import extra_gradients
from perturbjax.training.step import pixels

PLAIN, HAND_WRITTEN = "ce", "hand-written loop"
NOT_HERE = (
    "data", "view", "text_length", "vocabulary", "vocabulary_size", "vectors", "devices", "parallel", "stream", "steps_per_call",
    "checkpoint_seconds", "log_every", "test_every", "tensorboard",
)  # fmt: skip
"""Flags of training that a timed step has no use for."""
CIFAR_STEPS = 390  # an epoch of CIFAR-10 at batch 128


@dataclasses.dataclass(frozen=True)
class BenchSettings(shared.Settings):
    """Flags of bench.py."""

    model: str = "resnet20"
    """As in compare.py."""
    batch_size: int = 128
    """Samples per step."""
    methods: str = "la, lpl, lpl(bound=varied), lpg, lpa, lpa(site=stage2), lpa(site=stage1), sam, pugd, ls, focal, mixup, isda"
    """Methods, as in compare.py."""
    image_size: int = 32
    """Height and width of the (random) images."""
    num_classes: int = 10
    """Classes of the (random) labels."""
    rounds: int = 11
    """Interleaved rounds; the reported ratio is the median over them."""
    steps: int = 1
    """Steps per round and method; more for small nets, and whole periods of methods that don't do the same at every step."""
    json: str | None = None
    """File to write the ratios to."""


def main(argv: list[str]) -> None:
    """Runs the benchmark."""
    settings = shared.first_flags(argv, BenchSettings, __doc__, one_process=True)
    shared.refuse(settings, NOT_HERE, "bench.py", "Leave it out: steps are timed on random images and one device.")
    if settings.json:
        shared.check_file("--json", settings.json)
    methods = shared.parse_methods(settings.methods, settings.plugin)
    methods = {PLAIN: shared.parse_methods(PLAIN)[PLAIN], **methods}
    dataset = random_dataset(settings)
    shared.check_runs(settings, dataset, methods)
    programs, ideals = {}, {}
    for typed, (method, numbers) in methods.items():
        recipe = shared.make_recipe(settings, dataset, method)
        programs[typed], ideals[typed] = stepper(recipe, shared.make_numbers(settings, numbers), dataset)
    plain = shared.make_recipe(settings, dataset, methods[PLAIN][0]), shared.make_numbers(settings, methods[PLAIN][1])
    if settings.optimizer == "sgd" and settings.accumulate == 1:
        programs[HAND_WRITTEN] = hand_written(plain[0], settings, dataset)
    found = cost_ratios(programs, PLAIN, rounds=settings.rounds, steps=settings.steps)
    trainer = found.pop(HAND_WRITTEN, None)
    ideal = {typed: ideals[typed]() for typed in found}
    ratios = {t: {"ratio": r, "ideal": ideal[t], "quotient": r / ideal[t]} for t, r in found.items() if t != PLAIN}
    report = {
        "command": shared.command_line(),
        "versions": shared.versions(),
        "settings": dataclasses.asdict(settings),
        "ratios": ratios,
        "trainer": trainer,
    }
    show(report)
    keep(report, settings.json)
    report["data_path"] = data_path(*plain, dataset, settings.rounds)
    report["checkpoint"] = checkpoint_share(*plain, dataset)
    show_rest(report)
    keep(report, settings.json)


def keep(report: dict, file: str | None) -> None:
    """Writes the report, if a file is given for it."""
    if file:
        dump_json(pathlib.Path(file), report)


def random_dataset(settings: BenchSettings) -> Dataset:
    """Four batches of noise: timings don't depend on the values."""
    rng, count = np.random.default_rng(0), 4 * settings.batch_size
    images = rng.integers(0, 256, (count, settings.image_size, settings.image_size, 3), dtype=np.uint8)
    labels = (np.arange(count) % settings.num_classes).astype(np.int32)
    names = tuple(str(c) for c in range(settings.num_classes))
    return Dataset("random", images, labels, images[:16], labels[:16], names)


def stepper(recipe: Recipe, numbers: dict, dataset: Dataset):
    """(a call that trains one more step on the first batch, a call that gives the ideal cost of a step so far)."""
    run = TimedStep(recipe, numbers, dataset)
    metrics, work = run(), 1.0
    for link in split_methods(recipe.build(numbers["method"]))[0]:
        if link.search:
            share = share_after(recipe, run.state, dataset.train_images[: recipe.batch_size], link.site)
            work += 2 * inner_evaluations(recipe, metrics, link) / 3 * share
    return run, lambda: work * (1 + extra_gradients(run.state.opt_state) / int(run.state.step))


def inner_evaluations(recipe: Recipe, metrics: dict, link: Perturbation) -> float:
    """Of this link: its own count, where several links of one method have theirs."""
    name = f"{link.name}/inner_evaluations"
    return float(metrics.get(f"{name}@{line(recipe.model).site(link.site)}", metrics[name])[0])


def share_after(recipe: Recipe, state, images: np.ndarray, site: str) -> float:
    """f: floating-point operations of the forward pass after the site, over those of the whole pass (compiled cost analysis)."""
    model = line(recipe.model)
    place, inputs = model.site(site), pixels(images)
    run = lambda start, stop: lambda p, s, v: model.slice(p, v, start, stop, stats=s, train=True, key=jax.random.key(0))[0]

    def flops(start, value):
        cost = jax.jit(run(start, "logits")).lower(state.params, state.stats, value).compile().cost_analysis()
        return float((cost[0] if isinstance(cost, list) else cost).get("flops", 0.0))

    if place == "logits":
        return 0.0
    value = jax.eval_shape(run("input", place), state.params, state.stats, inputs)
    return flops(place, value) / flops("input", inputs)


def hand_written(recipe: Recipe, settings: BenchSettings, dataset: Dataset):
    """The same training step as people write it by hand: flax, optax, cross entropy, SGD; nothing of this library but the model."""
    data, model = device_data(dataset), recipe.model
    variables = jax.jit(lambda key, x: model.init(key, x, train=False))(jax.random.key(0), pixels(data.images[:1]))
    tx = optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(settings.learning_rate, momentum=settings.momentum, nesterov=settings.nesterov),
    )
    state = (variables["params"], variables.get("batch_stats", {}), tx.init(variables["params"]), jnp.int32(0))

    def step(state, data, index):
        params, stats, opt_state, count = state
        images = pixels(data.images[index])
        if recipe.augmentation:
            images = recipe.augmentation(images, jax.random.fold_in(jax.random.key(1), count), index)

        def loss(params):
            logits, new = model.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[index])
            return losses.mean(), new.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state, count + 1), value

    jitted, held = jax.jit(step, donate_argnums=0), [state]
    index = jnp.arange(recipe.batch_size, dtype=jnp.int32)

    def run():
        held[0], value = jitted(held[0], data, index)
        return value

    return run


def data_path(recipe: Recipe, numbers: dict, dataset: Dataset, rounds: int) -> float:
    """Steps a second with streamed images, over those with the data on the device; rounds of several steps, or reading ahead would
    hide the reading."""

    def program(streamed: bool) -> TimedStep:
        feed = Feed(dataclasses.replace(recipe, epochs=10**6), [dataset], [0], Devices(), 1, streamed, False)
        return TimedStep(recipe, numbers, dataset, feed=feed)

    programs = {"resident": program(False), "streamed": program(True)}
    return 1 / cost_ratios(programs, "resident", rounds=rounds, steps=8)["streamed"]


def checkpoint_share(recipe: Recipe, numbers: dict, dataset: Dataset) -> float:
    """Time of one checkpoint, until it is on the disk, over that of CIFAR_STEPS steps."""
    run, _ = stepper(recipe, numbers, dataset)
    state = init_state(recipe, numbers, device_data(dataset), 0)
    steps, saves = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(pathlib.Path(folder)) as checkpoints:
        for number in range(5):
            began = time.perf_counter()
            jax.block_until_ready(run())
            between = time.perf_counter()
            checkpoints.save(number, to_host(state), {})
            checkpoints.wait()
            steps.append(between - began)
            saves.append(time.perf_counter() - between)
    return float(np.median(saves) / (CIFAR_STEPS * np.median(steps)))


def show(report: dict) -> None:
    """The table."""
    shown = Table("method", "ratio", "ideal", "quotient", box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    for typed, entry in report["ratios"].items():
        shown.add_row(Text(typed), *(f"{entry[key]:.3f}" for key in ("ratio", "ideal", "quotient")))
    console = Console()
    console.print(shown)
    if report["trainer"] is not None:
        console.print(f"trainer: a hand-written loop's step takes {report['trainer']:.3f} of ours", highlight=False)


def show_rest(report: dict) -> None:
    """What is measured last: data and checkpoints."""
    console = Console()
    console.print(
        f"data path: streamed images reach {report['data_path']:.3f} of the rate with data on the device", highlight=False
    )
    share = f"{100 * report['checkpoint']:.2f} % of {CIFAR_STEPS} steps"
    console.print(f"checkpoint: one takes {share}", highlight=False)


if __name__ == "__main__":
    shared.start(main)
