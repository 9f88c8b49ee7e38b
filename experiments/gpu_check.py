"""Checks and measures the library on a GPU: its numbers against the CPU's, its costs, seeds side by side, CIFAR-10-LT.

    PYTHONPATH=. python experiments/gpu_check.py --tiny --out DIR                         # rehearsal on a CPU: about a minute
    PYTHONPATH=. python experiments/gpu_check.py --data CIFAR10LT.npz --out DIR           # everything, on a GPU
    PYTHONPATH=. python experiments/gpu_check.py --out DIR --parts numbers,bench          # what needs no data

    numbers   steps of methods of every target on the GPU and on the CPU from the same state: loss, update, states (PASS or FAIL)
    bench     bench.py's ratios, the trainer's, canonical against lax convolutions, data on the device against streamed
    vmap      seeds trained side by side against one run after the other
    longtail  CIFAR-10-LT at ratio 100, ResNet-32, LDAM's recipe: accuracies and seconds a run
    others    numbers, for all other methods of the library

gpu.json and gpu.md in --out grow with every result, and the same command goes on from there: what is in gpu.json is not measured
again, and a training that was cut off resumes from its checkpoint below --out/runs. On a machine that keeps nothing, gpu.json alone
brings the results along. Needs JAX, Flax, optax, Orbax, scikit-learn, pillow and rich; no tyro, no TFDS, no image codec.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench, compare, shared
from perturbjax import taxonomy
from perturbjax.analysis import paired_difference
from perturbjax.checks import check_choice
from perturbjax.data import Dataset
from perturbjax.models.blocks import CONVOLUTIONS
from perturbjax.training import (
    Devices,
    History,
    Interrupted,
    Options,
    Recipe,
    Run,
    cost_ratios,
    device_data,
    fit,
    fit_many,
    init_state,
    sample_data,
    split_methods,
)
from perturbjax.training.checkpoint import dump_json
from perturbjax.training.devices import from_host, to_host
from perturbjax.training.feed import Feed, stacked
from perturbjax.training.loop import extra_gradients
from perturbjax.training.step import as_arrays, compiled_step

PLAIN = compare.PLAIN
TOLERANCE = {"loss": 1e-5, "update": 5e-3, "params": 1e-2, "states": 1e-2}
"""Of the relative differences between device and CPU in float32 at the highest matmul precision; see `judged`."""
TARGET = 60.0  # seconds a run of the long tail may take, its seeds side by side
WORTH_IT = 0.98  # convolutions of the other kind are taken if they bring the time below this share
HOPELESS = 5.0  # so many times slower than the other kind, they are not measured further


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: on a GPU, and in the rehearsal."""

    first_methods: str = "ce, lpl, lpa(site=stage1), at, mixup, sam"  # also at the device's default precision
    more_methods: str = "at(step=unit), la, isda, lpa, dropout, ls, focal, lpg, clip, noise, pugd"
    other_methods: str | None = None  # for the part others; None: all others of the library
    number_model: str = "resnet8"
    number_batch: int = 16
    number_image: int = 16
    trials: int = 6
    conv_model: str = "resnet8"
    width: int | None = None  # of all models but the long tail's
    image_size: int = 32
    bench_models: tuple[str, ...] = ("resnet20", "resnet32")
    bench_methods: str = bench.BenchSettings.methods
    batch_size: int = 128
    rounds: int = 11
    most_steps: int = 50  # in a round, for each program
    train_model: str = "resnet32"
    examples: int = 12_800  # of the random training set behind the data rates and, without --data, the seeds side by side
    train_epochs: int = 3
    repeats: int = 3
    long_model: str = "resnet32"
    long_data: str | None = None


TINY = Sizes(
    first_methods="ce", more_methods="lpa(site=stage1), cosface", other_methods="dac", number_model="mlp", number_image=8, trials=2,
    conv_model="cnn", width=4, image_size=8, bench_models=("mlp",), bench_methods="lpa(site=stage1), sam", batch_size=16,
    rounds=2, most_steps=2, train_model="cnn", examples=64, train_epochs=2, repeats=2, long_model="mlp", long_data="digits",
)  # fmt: skip

LONG_TAIL = (
    "ce, la, lpl(split=frequency, tau=0.4, bound=varied_by_frequency(0, 2.5), step_size=0.3), "
    "lpg(split=frequency, bound=varied(0.1, 0.4)), lpa(split=frequency, bound=varied(0.1, 0.2)), sam"
)
"""From the papers: LPL τ in {0.4C, 0.5C, 0.6C}, ε = 0, Δε in {1.5, 2.5, 5}, α in {0.1, 0.2, 0.3}; LPG split at the median count, ε in
[0.1, 0.5]; LPA T = 3, β = 0.7, ε in [0.05, 0.3]; SAM ρ = 0.05. LPG's and LPA's own values were chosen by validation and are not told."""


@dataclasses.dataclass
class Check:
    """One call of this script: its flags, its machine, and the report as far as it has come."""

    flags: argparse.Namespace
    sizes: Sizes
    report: dict
    device: Any
    cpu: Any
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def out(self) -> pathlib.Path:
        return pathlib.Path(self.flags.out)

    def entry(self, *place: str) -> dict:
        """The dictionary at this place of the report, made if need be."""
        found = self.report
        for key in place:
            found = found.setdefault(key, {})
        return found

    def measure(self, place: tuple[str, ...], name: str, run: Callable[[], dict]) -> None:
        """Runs what is not in the report yet, and writes the report. An error is a result too: the next call tries again."""
        found = self.entry(*place)
        if name in found and "error" not in found[name]:
            self.say(f"{'/'.join((*place, name))}: there already")
            return
        started = time.perf_counter()
        try:
            found[name] = run()
        except Interrupted:  # the wish to stop: the training has saved its state
            self.save()
            raise
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        took = time.perf_counter() - started
        found[name] |= {"session": len(self.report["sessions"]) - 1, "took": round(took, 2)}
        self.save()
        self.say(f"{'/'.join((*place, name))}: {found[name].get('error', 'done')} ({took:.1f} s)")

    def save(self) -> None:
        """Writes gpu.json and gpu.md, and their copies."""
        self.report["sessions"][-1]["seconds"] = round(time.perf_counter() - self.began, 1)
        dump_json(self.out / "gpu.json", self.report)
        (self.out / "gpu.md").write_text(page(self.report))
        if self.flags.copy:
            for name in ("gpu.json", "gpu.md"):
                shutil.copy(self.out / name, self.flags.copy)

    def say(self, text: str) -> None:
        """A line of progress, at once: a killed run shows how far it came."""
        print(f"[{time.perf_counter() - self.began:7.1f} s] {text}", flush=True)


def main(argv: list[str]) -> None:
    """Runs the parts that were asked for."""
    flags = parse(argv)
    device = find_device(flags.tiny)
    for folder in filter(None, (flags.out, flags.copy)):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    check = Check(flags, TINY if flags.tiny else Sizes(), open_report(flags), device, find_cpu())
    check.report["sessions"].append(session(check))
    check.say(f"{device.device_kind} ({device.platform}), JAX {jax.__version__}")
    check.save()
    for part in flags.parts:
        PARTS[part](check)
    check.save()
    print(page(check.report))
    if problems := list(troubles(check.report)):
        raise SystemExit(f"not all right: {'; '.join(problems)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. By argparse and not by tyro as in the other scripts: what is rehearsed here is what runs where tyro is missing."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", required=True, help="folder for gpu.json, gpu.md and the runs; begun work in it goes on")
    add("--copy", help="folder that gets a copy of gpu.json and gpu.md after every result")
    add("--data", help="CIFAR-10 or its long-tailed cut: an .npz file, as for compare.py --data")
    add("--view", help="its view; if not given: longtail(100) for balanced data, none for data that is long-tailed already")
    add("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, separated by commas")
    add("--methods", help="of the long tail, as for compare.py; if not given: in the papers' settings")
    add("--epochs", type=int, help="of the long tail; 200 if not given")
    add("--seeds", type=int, help="of the long tail, and runs side by side; 5 if not given")
    add("--conv", default="auto", help="canonical, lax, or auto: the faster of the two in each part")
    add("--tiny", action="store_true", help="the same code on tiny nets and data, on any device: a rehearsal")
    flags = parser.parse_args(argv)
    flags.parts = [part.strip() for part in flags.parts.split(",")]
    for part in flags.parts:
        check_choice("gpu_check", "--parts", part, PARTS)
    check_choice("gpu_check", "--conv", flags.conv, ("auto", *CONVOLUTIONS))
    flags.seeds = flags.seeds if flags.seeds is not None else 2 if flags.tiny else 5
    flags.epochs = flags.epochs if flags.epochs is not None else 2 if flags.tiny else 200
    flags.methods = flags.methods or ("ce, lpl(bound=0.5)" if flags.tiny else LONG_TAIL)
    if flags.seeds < 2:
        raise ValueError(f"gpu_check needs --seeds of at least 2, got {flags.seeds}. Write --seeds 5.")
    if "longtail" in flags.parts and not (flags.data or flags.tiny):
        raise ValueError(
            "gpu_check needs --data for the part longtail, got none. Write --data CIFAR10LT.npz (docs/results/gpu.md says how to make "
            "it), or --parts numbers,bench,vmap."
        )
    return flags


def find_device(tiny: bool) -> Any:
    """The first device; without an accelerator only for a rehearsal."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        if not tiny:
            raise ValueError(
                f"gpu_check needs a GPU, got {device.device_kind!r}, the only kind of device that this JAX sees. Install JAX for the GPU "
                "(pip install -U 'jax[cuda13]'), unset JAX_PLATFORMS if it says cpu, or write --tiny for a rehearsal on the CPU."
            )
        print("note: no GPU here. This is a rehearsal, and its numbers mean nothing.", flush=True)
    return device


def find_cpu() -> Any:
    """The CPU as a device, beside the GPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"gpu_check needs JAX's CPU device beside the GPU, got none ({error}). Unset JAX_PLATFORMS, or set it to cuda,cpu."
        ) from error


def open_report(flags: argparse.Namespace) -> dict:
    """The report in --out, or a new one."""
    file = pathlib.Path(flags.out) / "gpu.json"
    if not file.exists():
        return {"tiny": flags.tiny, "sessions": []}
    report = json.loads(file.read_text())
    if report["tiny"] != flags.tiny:
        raise ValueError(
            f"gpu_check needs an --out of {'a rehearsal' if flags.tiny else 'the check itself'}, got {file} of the other kind. "
            "Name another --out."
        )
    return report


def session(check: Check) -> dict:
    """What this call ran on; every result has the number of its session."""
    try:
        git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its repository
        commit = None
    return {
        "command": shared.command_line(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": check.device.device_kind,
        "platform": check.device.platform,
        "device_count": jax.device_count(),
        "memory": (check.device.memory_stats() or {}).get("bytes_limit"),
        "versions": shared.versions(),
        "commit": commit,
    }


# ----------------------------------------------------------------------------------------------------------- numbers


def numbers(check: Check) -> None:
    """Part (a): steps on the device and on the CPU, of methods that cover every target."""
    dataset, sizes, plain = patches(check.sizes), check.sizes, shared.parse_methods(PLAIN)[PLAIN]
    for methods, both in ((sizes.first_methods, True), (sizes.more_methods, False)):
        for name, what in shared.parse_methods(methods).items():
            check.measure(("numbers", "methods"), name, partial(compare_steps, check, dataset, what, both))
    check.measure(("numbers", "methods"), f"{PLAIN}, 2 seeds vmapped", partial(compare_vmapped, check, dataset, plain))
    check.measure(("numbers",), "convolutions", partial(compare_convolutions, check, dataset, plain))


def others(check: Check) -> None:
    """The same for all other methods."""
    dataset, sizes = patches(check.sizes), check.sizes
    known = ", ".join(getattr(factory, "alias", None) or name for name, factory in taxonomy.methods().items())
    done = shared.parse_methods(f"{sizes.first_methods}, {sizes.more_methods}")
    for name, what in shared.parse_methods(sizes.other_methods or known).items():
        if name not in done:
            check.measure(("others", "methods"), name, partial(compare_steps, check, dataset, what, False))


def patches(sizes: Sizes) -> Dataset:
    """One batch of coloured, noisy patches. An epoch is one step: then statistics over epochs are in use at the second step."""
    rng, count, edge = np.random.default_rng(0), sizes.number_batch, sizes.number_image // 4
    images = rng.integers(0, 192, (count, 4, 4, 3)).repeat(edge, 1).repeat(edge, 2)
    images = (images + rng.integers(0, 64, images.shape)).astype(np.uint8)
    labels = (np.arange(count) % 10).astype(np.int32)
    return Dataset("patches", images, labels, images[:16], labels[:16], tuple(map(str, range(10))))


class Step(NamedTuple):
    """A training step, on the host."""

    before: Any  # TrainState
    after: Any
    loss: float


class Stepper:
    """Single steps of one method on any device, from and to states on the host."""

    def __init__(self, check: Check, dataset: Dataset, method: tuple, model: str, head: str = "linear"):
        sizes, self.check, self.dataset = check.sizes, check, dataset
        settings = shared.Settings(model=model, width=sizes.width, head=head, batch_size=sizes.number_batch, epochs=8)
        self.recipe, self.settings = shared.make_recipe(settings, dataset, method[0]), shared.make_numbers(settings, method[1])
        self.numbers, self.index = as_arrays(self.settings), np.arange(sizes.number_batch, dtype=np.int32)[None]
        self.like = self._init(0)

    def _init(self, seed: int) -> Any:
        with jax.default_device(self.check.cpu):
            return init_state(self.recipe, self.settings, sample_data(self.dataset), seed)

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        return to_host(self._init(seed))

    def __call__(self, host: Any, device: Any, precision: str | None = "highest") -> Step:
        """One step on this device; precision: of products and convolutions, None for the device's default."""
        with jax.default_device(device), jax.default_matmul_precision(precision):
            given = (from_host(host, self.like), self.numbers, device_data(self.dataset), self.index)
            # Put there by hand: arguments that are bound to a device decide where the step is compiled and runs.
            state, metrics, _ = compiled_step(self.recipe)(*jax.device_put(given, device))
            return Step(host, to_host(state), float(metrics["loss"][0]))

    def side_by_side(self, hosts: list, device: Any) -> list[Step]:
        """The same for several states at once, vmapped."""
        count = len(hosts)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            state = stacked([from_host(host, self.like) for host in hosts])._replace(step=jnp.asarray(hosts[0].step))
            given = (state, stacked([self.numbers] * count), device_data(self.dataset), np.stack([self.index] * count))
            state, metrics, _ = compiled_step(self.recipe, vmapped="shared")(*jax.device_put(given, device))
            after = to_host(state)
        own = lambda s: jax.tree.map(lambda x: x[s], after._replace(step=None))._replace(step=after.step)
        return [Step(hosts[s], own(s), float(metrics["loss"][s, 0])) for s in range(count)]


def compare_steps(check: Check, dataset: Dataset, method: tuple, both: bool) -> dict:
    """The method's trials, judged; with the cosine head if it needs that, skipped if it has no default for something else."""
    reasons = []
    for head in ("linear", "cosine"):
        try:
            step = Stepper(check, dataset, method, check.sizes.number_model, head)
            return {"head": head, **judged(steps_of_seeds(check, step, both))}
        except ValueError as error:  # what the library says to settings that can't be
            reasons.append(f"{head} head: {str(error)[:300]}")
    return {"skipped": reasons}


def steps_of_seeds(check: Check, step: "Stepper", both: bool) -> dict[str, list]:
    """Two steps for each seed, each from the CPU's state: on the device, and on the CPU from parameters changed by some roundings."""
    trials: dict[str, list] = {"highest": [], "nudged": []} | ({"default": []} if both else {})
    for seed in range(check.sizes.trials):
        host, rows = step.start(seed), {name: [] for name in trials}
        for _ in range(2):
            wanted = step(host, check.cpu)
            found = {"highest": step(host, check.device), "nudged": step(nudged(host, seed), check.cpu)}
            found |= {"default": step(host, check.device, None)} if both else {}
            for name, row in rows.items():
                row.append(differences(found[name], wanted))
            host = wanted.after
        for name, row in rows.items():
            trials[name].append(row)
    return trials


def compare_vmapped(check: Check, dataset: Dataset, method: tuple) -> dict:
    """One step of two seeds side by side on the device, against the CPU's steps one by one."""
    step, trials = Stepper(check, dataset, method, check.sizes.number_model), {"highest": [], "nudged": []}
    for seed in range(check.sizes.trials):
        hosts = [step.start(2 * seed), step.start(2 * seed + 1)]
        wanted, found = [step(host, check.cpu) for host in hosts], step.side_by_side(hosts, check.device)
        rows = [differences(f, w) for f, w in zip(found, wanted, strict=True)]
        trials["highest"].append([{key: max(row[key] for row in rows) for key in rows[0]}])
        trials["nudged"].append([differences(step(nudged(hosts[0], seed), check.cpu), wanted[0])])
    return judged(trials)


def compare_convolutions(check: Check, dataset: Dataset, method: tuple) -> dict:
    """Canonical against lax convolutions on the device; what doesn't repeat itself can't be bit-equal to something else."""
    steps, found = {conv: Stepper(check, dataset, method, check.sizes.conv_model) for conv in CONVOLUTIONS}, {}
    for conv, step in steps.items():
        step.recipe = with_conv(step.recipe, conv)
    host = steps["canonical"].start(0)
    for name, precision in (("highest", "highest"), ("default", None)):
        canonical, again = (steps["canonical"](host, check.device, precision) for _ in range(2))
        lax = steps["lax"](host, check.device, precision)
        update = plain_number(differences(lax, canonical)["update"])
        found[name] = {"bit_equal": same(lax, canonical), "repeats": same(canonical, again), "update": update}
    return found


def nudged(host: Any, seed: int) -> Any:
    """The state with its parameters changed by about ten roundings: how much does any change grow in a step?"""
    rng = np.random.default_rng(seed)
    return host._replace(
        params=jax.tree.map(lambda x: (x * (1 + 1e-6 * rng.standard_normal(x.shape))).astype(x.dtype), host.params)
    )


def same(a: Any, b: Any) -> bool:
    """Whether all leaves are equal, bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def differences(found: Step, wanted: Step) -> dict[str, float]:
    """Relative differences: of the loss, of the step's update as a whole, and the largest over parameters and over states."""
    flat = lambda tree: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
    update = lambda step: flat(step.after.params) - flat(step.before.params)
    states = lambda step: (step.after.stats, step.after.opt_state, step.after.states)
    largest = lambda a, b: float(np.max([apart(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))
    return {
        "loss": apart(found.loss, wanted.loss),
        "update": apart(update(found), update(wanted)),
        "params": largest(found.after.params, wanted.after.params),
        "states": largest(states(found), states(wanted)),
    }


def apart(a: Any, b: Any) -> float:
    """‖a − b‖/‖b‖ in float64. Where b is all but zero (root mean square below 1e-6), so small an a is as good as b."""
    a, b = (np.ravel(np.asarray(x)).astype(np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6 * b.size**0.5)) if b.size else 0.0


def judged(trials: dict[str, list[list[dict[str, float]]]]) -> dict:
    """Typical differences (the smallest over the seeds, the largest over a run's steps), and whether they are as small as they should be.

    A ReLU or a sign of a gradient that turns for a rounding changes the update by a thousandth or more, in a step here and there;
    an error of the program is there in every step. So the smallest counts, and it has to be below the tolerance, or below ten
    times what ten roundings do on the CPU alone; no number may be nan or infinite.
    """
    typical = {
        name: {key: float(np.max(np.min([[row[key] for row in rows] for rows in found], axis=0))) for key in TOLERANCE}
        for name, found in trials.items()
    }
    everything = [row[key] for rows in trials["highest"] for row in rows for key in row]
    limits = {key: max(limit, 10 * typical["nudged"][key]) for key, limit in TOLERANCE.items()}
    passed = np.isfinite(everything).all() and all(typical["highest"][key] <= limit for key, limit in limits.items())
    plain = {name: {key: plain_number(x) for key, x in row.items()} for name, row in typical.items()}
    worst = np.max([row["update"] for rows in trials["highest"] for row in rows])
    return {**plain, "worst_update": plain_number(worst), "passed": bool(passed)}


def plain_number(x: Any) -> float | str:
    """A number for JSON, which has no nan and no infinity: those become text."""
    return float(x) if np.isfinite(x) else str(x)


def with_conv(recipe: Recipe, conv: str) -> Recipe:
    """The recipe with that kind of convolutions, where its model has any."""
    return dataclasses.replace(recipe, model=recipe.model.clone(conv=conv)) if hasattr(recipe.model, "conv") else recipe


# ------------------------------------------------------------------------------------------------------------- bench


def costs(check: Check) -> None:
    """Part (b): bench.py's table for each net, and the data rates."""
    for model in check.sizes.bench_models:
        check.measure(("bench",), model, partial(ratios, check, model))
    check.measure(("bench",), "data", partial(data_rates, check))


def ratios(check: Check, model: str) -> dict:
    """Step times relative to plain training, in the form that one call of the step has."""
    sizes = check.sizes
    settings = bench.BenchSettings(
        model=model, width=sizes.width, batch_size=sizes.batch_size, image_size=sizes.image_size, methods=sizes.bench_methods,
        augment=True,
    )  # fmt: skip
    dataset, methods = bench.random_dataset(settings), shared.parse_methods(f"{PLAIN}, {settings.methods}")
    recipe = lambda typed: shared.make_recipe(settings, dataset, methods[typed][0])
    start = lambda recipe, typed: stepper(check, recipe, shared.make_numbers(settings, methods[typed][1]), dataset)
    plain = {conv: start(with_conv(recipe(PLAIN), conv), PLAIN)[0] for conv in CONVOLUTIONS}
    steps = steps_in_a_round(plain["canonical"], sizes.most_steps)
    lax = cost_ratios(plain, "canonical", rounds=sizes.rounds, steps=steps)["lax"]
    conv = chosen(check, lax)
    programs, ideals, left_out = {}, {}, {}
    for typed in methods:
        check.say(f"bench/{model}: compiles {typed}")
        try:
            programs[typed], ideals[typed] = start(with_conv(recipe(typed), conv), typed)
        except Exception as error:  # one method that doesn't run costs its own line only
            traceback.print_exc()
            left_out[typed] = f"{type(error).__name__}: {str(error)[:300]}"
    again = f"{PLAIN}, once more"
    programs[again] = start(with_conv(recipe(PLAIN), conv), PLAIN)[0]
    programs[bench.HAND_WRITTEN] = bench.hand_written(with_conv(recipe(PLAIN), conv), settings, dataset)
    steps = steps_in_a_round(programs[PLAIN], sizes.most_steps)
    milliseconds = 1000 * seconds_a_step(programs[PLAIN], steps)
    found = cost_ratios(programs, PLAIN, rounds=sizes.rounds, steps=steps)
    trainer, noise = found.pop(bench.HAND_WRITTEN), found.pop(again)
    return {
        "ratios": {t: {"ratio": r, "ideal": ideals[t], "quotient": r / ideals[t]} for t, r in found.items() if t != PLAIN},
        "trainer": trainer, "noise": noise, "lax_over_canonical": lax, "conv": conv, "step_milliseconds": milliseconds,
        "rounds": sizes.rounds, "steps": steps, "batch_size": sizes.batch_size, "image_size": sizes.image_size, "left_out": left_out,
    }  # fmt: skip


def stepper(check: Check, recipe: Recipe, numbers: dict, dataset: Dataset) -> tuple[Callable[[], dict], float]:
    """As bench.stepper: (a call that trains one more step, the method's ideal cost).

    The share of the work behind a site is counted on the CPU: compiled for a GPU, convolutions are calls of a library, whose
    operations the compiler doesn't know.
    """
    data, arrays, step = device_data(dataset), as_arrays(numbers), compiled_step(recipe)
    held = [init_state(recipe, numbers, data, 0)]
    index = jnp.arange(recipe.batch_size, dtype=jnp.int32)[None]

    def run():
        held[0], metrics, _ = step(held[0], arrays, data, index)
        return metrics

    metrics, work = jax.device_get(run()), 1.0
    with jax.default_device(check.cpu):
        for link in split_methods(recipe.build(numbers["method"]))[0]:
            if link.search:
                state = init_state(recipe, numbers, sample_data(dataset), 0)
                share = bench.share_after(recipe, state, dataset.train_images[: recipe.batch_size], link.site)
                work += 2 * bench.inner_evaluations(recipe, metrics, link) / 3 * share
    return run, work * (1 + extra_gradients(held[0].opt_state))


def seconds_a_step(run: Callable, steps: int) -> float:
    """Of a program that is compiled: the mean over `steps` calls, waited for at the end."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    for _ in range(steps):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps


def steps_in_a_round(run: Callable, most: int) -> int:
    """So many that a program's turn takes a tenth of a second: far above the clock's noise, and calls run ahead of the device."""
    return int(np.clip(0.1 / seconds_a_step(run, 3), 1, most))


def chosen(check: Check, lax: float) -> str:
    """The kind of convolutions to go on with, given the time of lax ones over that of canonical ones."""
    return check.flags.conv if check.flags.conv != "auto" else "lax" if lax < WORTH_IT else "canonical"


def random_images(sizes: Sizes) -> Dataset:
    """Noise: rates don't depend on the values."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes.examples, sizes.image_size, sizes.image_size, 3), dtype=np.uint8)
    labels = (np.arange(sizes.examples) % 10).astype(np.int32)
    return Dataset("random", images, labels, images[:512], labels[:512], tuple(map(str, range(10))))


def plain_training(sizes: Sizes, model: str, dataset: Dataset, width: int | None) -> tuple[Recipe, dict]:
    """Plain cross entropy, LDAM's crops and flips, for a few epochs."""
    settings = shared.Settings(
        model=model, width=width, batch_size=sizes.batch_size, epochs=sizes.train_epochs, augment=True, learning_rate=0.05
    )
    method, numbers = shared.parse_methods(PLAIN)[PLAIN]
    return shared.make_recipe(settings, dataset, method), shared.make_numbers(settings, numbers)


def data_rates(check: Check) -> dict:
    """Training images a second: data on the device and streamed, one step in a call and many."""
    sizes, dataset = check.sizes, random_images(check.sizes)
    recipe, numbers = plain_training(sizes, sizes.bench_models[0], dataset, sizes.width)
    rates = {}
    for streamed, steps in itertools.product((False, True), (1, 100)):
        found = fit(recipe, dataset, numbers, 0, options=Options(stream=streamed, steps_per_call=steps))
        rates[f"{'streamed' if streamed else 'resident'}, {steps} a call"] = found.examples_per_second
    for steps in (1, 100):
        feed = Feed(recipe, [dataset], [0], Devices(), steps, True, False)
        began = time.perf_counter()
        for call in feed.calls(0):
            jax.block_until_ready(call.images)
        rates[f"reading alone, {steps} a call"] = recipe.total_steps * recipe.batch_size / (time.perf_counter() - began)
    return {
        "model": sizes.bench_models[0], "images_a_second": rates,
        "data_path": bench.data_path(recipe, numbers, dataset, sizes.rounds),
        "checkpoint": bench.checkpoint_share(recipe, numbers, dataset),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- vmap


def side_by_side(check: Check) -> None:
    """Part (c): seeds at once against one after the other, for both kinds of convolutions."""
    for conv in ("lax", "canonical"):  # JAX's own first: the other may be far slower where it wasn't made for
        check.measure(("vmap",), conv, partial(speed_up, check, conv))


def speed_up(check: Check, conv: str) -> dict:
    """Seconds of training (no compilation, no evaluation) of one run, and of a run among `seeds`; medians of alternating repeats."""
    sizes, count = check.sizes, check.flags.seeds
    dataset = datasets(check)[1][0] if check.flags.data and not check.flags.tiny else random_images(sizes)
    recipe, numbers = plain_training(sizes, sizes.train_model, dataset, sizes.width)
    recipe, options = with_conv(recipe, conv), Options(steps_per_call=100)
    runs = [Run(dataset, numbers, seed) for seed in range(count)]
    rival = min([row["seconds_one"] for row in check.report["vmap"].values() if "seconds_one" in row], default=np.inf)
    one, many = [], []
    for _ in range(sizes.repeats):
        one.append(fit(recipe, dataset, numbers, 0, options=options).seconds)
        if one[0] > HOPELESS * rival and not check.flags.tiny:
            return {"seconds_one": one[0], "given_up": f"{one[0] / rival:.1f} times the other kind's time"}
        many.append(sum(history.seconds for history in fit_many(recipe, runs, options=options)))
    ratio = [m / (count * o) for m, o in zip(many, one)]
    return {
        "model": sizes.train_model, "steps": recipe.total_steps, "runs": count, "seconds_one": statistics.median(one),
        "seconds_a_run_of_many": statistics.median(many) / count, "ratio": statistics.median(ratio), "ratio_from": min(ratio),
        "ratio_to": max(ratio), "speed_up": 1 / statistics.median(ratio), "one": one, "many": many,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- longtail


def long_tail(check: Check) -> None:
    """Part (d): the comparison on the long tail, method by method."""
    settings, data = datasets(check)
    methods = shared.parse_methods(settings.methods)
    shared.check_runs(settings, data[0], methods)
    claim(check, settings, data)
    conv, together = way_to_train(check)
    check.say(f"longtail: {data[0]}; {conv} convolutions, seeds {'side by side' if together else 'one after the other'}")
    for typed, what in methods.items():
        check.measure(("longtail", "methods"), typed, partial(trained, check, settings, data, {typed: what}, conv, together))


def datasets(check: Check) -> tuple[compare.CompareSettings, list[Dataset]]:
    """Settings and training sets of the long tail. Data that is long-tailed already is taken as it is: then all seeds share it."""
    flags, sizes = check.flags, check.sizes
    name = flags.data or sizes.long_data
    view = flags.view
    if view is None:
        counts = shared.source(name).class_counts
        view = "none" if counts.max() >= 5 * counts.min() else "longtail(10)" if flags.tiny else "longtail(100)"
    settings = compare.CompareSettings(
        data=name, view=view, model=sizes.long_model, methods=flags.methods, seeds=flags.seeds, cost_rounds=0, devices=1,
        **shared.flags_of_recipe("ldam", flags.epochs),
    )  # fmt: skip
    if view == "none":
        return settings, [shared.load_view(settings, 0)] * flags.seeds
    return settings, [shared.load_view(settings, seed) for seed in range(flags.seeds)]


def claim(check: Check, settings: compare.CompareSettings, data: list[Dataset]) -> None:
    """Writes down what is trained on, or compares it: accuracies of different settings don't belong in one table."""
    first, entry = data[0], check.entry("longtail")
    wanted = {
        "model": settings.model, "recipe": settings.recipe, "epochs": settings.epochs, "batch_size": settings.batch_size,
        "seeds": settings.seeds, "view": settings.view, "train_size": len(first.train_labels), "test_size": len(first.test_labels),
        "class_counts": [int(n) for n in first.class_counts], "subset_hash": [d.subset_hash for d in data],
    }  # fmt: skip
    if (found := entry.setdefault("settings", wanted)) != wanted:
        key = next(key for key in wanted if found.get(key) != wanted[key])
        raise ValueError(
            f"gpu_check needs the long tail's settings that --out was begun with, got {key} {wanted[key]} instead of {found.get(key)}. "
            "Give the same flags and data, or name another --out."
        )


def way_to_train(check: Check) -> tuple[str, bool]:
    """(the kind of convolutions, whether seeds train side by side): what the part vmap found fastest; a rehearsal rehearses that."""
    found = {conv: row for conv, row in check.report.get("vmap", {}).items() if "ratio" in row}
    if not found or check.flags.tiny:
        return "canonical" if check.flags.conv == "auto" else check.flags.conv, True
    best = {conv: min(row["seconds_a_run_of_many"], row["seconds_one"]) for conv, row in found.items()}
    conv = chosen(check, best["lax"] / best["canonical"]) if len(found) == 2 else next(iter(found))
    return conv, found[conv]["seconds_a_run_of_many"] <= found[conv]["seconds_one"]


def trained(
    check: Check, settings: compare.CompareSettings, data: list[Dataset], method: dict, conv: str, together: bool
) -> dict:
    """One method with all its seeds: results.json's numbers, and the time."""
    planned = [
        dataclasses.replace(one, recipe=with_conv(one.recipe, conv)) for one in compare.plan(settings, data, method, check.out)
    ]
    # Runs that an earlier call finished are read; the others train, and go on from their checkpoints.
    histories = {one.folder: History.load(end) for one in planned if (end := one.folder / "finished.npz").exists()}
    left = [one for one in planned if one.folder not in histories]
    clock, every = [], max(1, settings.epochs // 10)

    def tick(epoch, found):
        clock.append(time.perf_counter())
        if (epoch + 1) % every == 0:
            check.say(
                f"{planned[0].typed}: epoch {epoch + 1}, loss {found['loss']:.3f}, accuracy {100 * found['accuracy']:.2f}"
            )

    for group in [left] if together and left else [[one] for one in left]:
        clock.clear()
        histories |= compare.train_group(settings, group, check.out, tick)
    # Between the ends of two epochs lie training and evaluation, but no compilation.
    epoch = (clock[-1] - clock[0]) / (len(clock) - 1) if len(clock) > 1 else None
    at_once = len(left) if together else 1
    found = shared.record([histories[one.folder] for one in planned], data)
    found["timing"] = {
        "seconds_a_run": None if epoch is None else epoch * settings.epochs / at_once,
        "training_seconds_a_run": found["seconds"] / len(planned), "conv": conv, "side_by_side": at_once,
    }  # fmt: skip
    return found


# -------------------------------------------------------------------------------------------------------------- page


def troubles(report: dict) -> Iterable[str]:
    """What is wrong, as far as the report knows."""
    for part in PARTS:
        for name, row in [*report.get(part, {}).items(), *report.get(part, {}).get("methods", {}).items()]:
            if "error" in row:
                yield f"{part} {name}: {row['error'][:80]}"
            if row.get("passed") is False:
                yield f"{part} {name}: FAIL"
            if part == "numbers" and "skipped" in row:  # of the others some may need what has no default
                yield f"{part} {name}: skipped, {row['skipped'][0]}"
            if row.get("left_out"):
                yield f"{part} {name}: without {', '.join(row['left_out'])}"


def page(report: dict) -> str:
    """gpu.md."""
    parts = [numbers_page, bench_page, vmap_page, longtail_page, others_page]
    body = [part(report[name]) for name, part in zip(PARTS, parts, strict=True) if report.get(name)]
    ran = [
        f"- session {i}: {s['date']}, {s['device']} ({s['platform']}), JAX {s['versions']['jax']}, commit {s['commit']}, "
        f"{s.get('seconds', 0):.0f} s: `{s['command']}`"
        for i, s in enumerate(report["sessions"])
    ]
    kind = "**A rehearsal: these numbers mean nothing.**\n\n" if report["tiny"] else ""
    return f"# On a GPU\n\n{kind}" + "\n\n".join([*body, "\n".join(ran)]) + "\n"


def rows(head: str, lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; head: its columns, separated by |."""
    show = lambda x: x if isinstance(x, str) else "–" if x is None else f"{x:.3g}" if abs(x) < 0.01 else f"{x:.3f}"
    bars = lambda cells: "| " + " | ".join(cells) + " |"
    columns = [cell.strip() for cell in head.split("|")]
    return "\n".join([bars(columns), bars("---" for _ in columns), *(bars(show(x) for x in line) for line in lines)])


def small(x: Any) -> str:
    """A relative difference in a table."""
    return x if isinstance(x, str) else "–" if x is None else f"{x:.1e}"


def verdicts(found: dict) -> str:
    """The table of the parts numbers and others."""
    lines = []
    for name, row in found.get("methods", {}).items():
        if "skipped" in row or "error" in row:
            lines.append([name, *["–"] * 7, "skipped" if "skipped" in row else "error"])
            continue
        cells = [*row["highest"].values(), row["nudged"]["update"], row["worst_update"], row.get("default", {}).get("update")]
        lines.append([name, *map(small, cells), "PASS" if row["passed"] else "**FAIL**"])
    return rows(
        "method | loss | update | parameters | states | update, nudged | update, worst | update, default precision | ", lines
    )


def numbers_page(found: dict) -> str:
    """The part numbers."""
    limits = ", ".join(f"{key} {limit:g}" for key, limit in TOLERANCE.items())
    text = (
        "## Numbers: device against CPU\n\nRelative differences ‖a − b‖/‖b‖ of single steps from the same state, at matmul precision "
        "highest: of the loss, of the update as a whole, and of the parameter and the state that differ most; the smallest over the "
        "seeds, since a ReLU that turns for a rounding moves the update by a thousandth now and then. Nudged: the update's on the CPU "
        f"alone, after changing the parameters by 1e-6. PASS: at most {limits}, or ten times nudged.\n\n" + verdicts(found)
    )
    if "highest" in (conv := found.get("convolutions", {})):
        for name, row in ((name, conv[name]) for name in ("highest", "default")):
            equal = "bit-equal" if row["bit_equal"] else f"not bit-equal (update {small(row['update'])} apart)"
            repeats = "repeats itself" if row["repeats"] else "doesn't repeat itself"
            text += f"\n\nCanonical and lax convolutions, precision {name}: {equal}; the same step twice {repeats}."
    return text


def others_page(found: dict) -> str:
    """The part others."""
    return "## Numbers of the other methods\n\n" + verdicts(found)


def bench_page(found: dict) -> str:
    """The part bench."""
    text = "## Costs, relative to plain cross entropy"
    for model, row in found.items():
        if "ratios" not in row:
            continue
        lines = ([t, *(entry[k] for k in ("ratio", "ideal", "quotient"))] for t, entry in row["ratios"].items())
        text += (
            f"\n\n{model}, batch {row['batch_size']}, {row['image_size']}×{row['image_size']} images, {row['conv']} convolutions: "
            f"{row['step_milliseconds']:.2f} ms a step. Medians over {row['rounds']} interleaved rounds of {row['steps']} steps; plain "
            f"training against itself: {row['noise']:.3f}.\n\n" + rows("method | ratio | ideal | ratio / ideal", lines) +
            f"\n\nA hand-written loop's step takes {row['trainer']:.3f} of ours. Lax convolutions take {row['lax_over_canonical']:.3f} "
            "of the time of canonical ones."
        )  # fmt: skip
    if "images_a_second" in (data := found.get("data", {})):
        lines = ([name, f"{rate:.0f}"] for name, rate in data["images_a_second"].items())
        text += f"\n\nData rates, {data['model']}:\n\n" + rows("data | images a second", lines)
        text += (
            f"\n\nbench.py's data path (streamed over resident, one step a call): {data['data_path']:.3f}; its checkpoint: "
            f"{100 * data['checkpoint']:.2f} % of an epoch of {bench.CIFAR_STEPS} steps."
        )
    return text


def vmap_page(found: dict) -> str:
    """The part vmap."""
    keys = ("seconds_one", "seconds_a_run_of_many", "ratio", "speed_up")
    done = {conv: row for conv, row in found.items() if "ratio" in row}
    text = "## Seeds side by side"
    for first in list(done.values())[:1]:
        lines = (
            [conv, *(row[key] for key in keys), f"{row['ratio_from']:.3f}–{row['ratio_to']:.3f}"] for conv, row in done.items()
        )
        text += f"\n\n{first['model']}, {first['steps']} steps, {first['runs']} runs at once; seconds of training.\n\n"
        text += rows("convolutions | one run | a run of many | ratio | speed-up | ratio, range", lines)
    for conv, row in found.items():
        if "given_up" in row:
            text += f"\n\nNot measured further with {conv} convolutions: {row['given_up']}."
    return text


def longtail_page(found: dict) -> str:
    """The part longtail."""
    settings, done = found["settings"], {t: row for t, row in found.get("methods", {}).items() if "accuracy" in row}
    percent = lambda of: "–" if of is None else f"{100 * of['mean']:.2f}"
    spread = lambda of: f"{percent(of)} ± {100 * of['std']:.2f}"
    lines = []
    for typed, row in done.items():
        difference = "–"
        if (reference := next(iter(done))) != typed:
            paired = paired_difference(row["accuracy"]["values"], done[reference]["accuracy"]["values"])
            difference = f"{100 * paired['mean']:+.2f}"
        timing = row["timing"]
        lines.append(
            [typed, spread(row["accuracy"]), *(percent(row[k]) for k in ("head", "medium", "tail")), difference,
             spread(row["best_epoch_accuracy"]), timing["training_seconds_a_run"], timing["seconds_a_run"],
             "–" if timing["seconds_a_run"] is None else "yes" if timing["seconds_a_run"] <= TARGET else "no"]
        )  # fmt: skip
    own = "one subset for all seeds" if len(set(settings["subset_hash"])) == 1 else "each seed draws its own"
    return (
        f"## Long tail\n\n{settings['model']}, {settings['train_size']} training and {settings['test_size']} test images, classes of "
        f"{max(settings['class_counts'])} to {min(settings['class_counts'])} ({own}, {settings['subset_hash'][0]}), recipe "
        f"{settings['recipe']}, {settings['epochs']} epochs, {settings['seeds']} seeds: test accuracy in % after the last epoch. "
        "Seconds a run: of its training alone, and with the evaluation after each epoch; no compilation.\n\n"
        + rows("method | accuracy | head | medium | tail | difference | best epoch | s training | s a run | ≤ 60 s", lines)
    )


PARTS: dict[str, Callable[[Check], None]] = {
    "numbers": numbers,
    "bench": costs,
    "vmap": side_by_side,
    "longtail": long_tail,
    "others": others,
}

if __name__ == "__main__":
    shared.start(main)
