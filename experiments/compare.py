"""Trains several methods over the same seeds and the same splits, and says which helps, by how much, at what cost.

    python experiments/compare.py                                                        # the embedded digits, long-tailed
    python experiments/compare.py --methods "ce, la, lpl(bound=varied), sam+lpg" --seeds 5 --out DIR
    python experiments/compare.py --data CIFAR10.npz --view "longtail(100)" --model resnet20 --batch-size 128 --methods "ce, lpl"
    python experiments/compare.py --list                                                 # all methods
    python experiments/compare.py --config small_longtail --data CIFAR10.npz             # a protocol from experiments/configs
    python experiments/compare.py --config small_longtail --smoke                        # its small version, on digits

Writes results.json and report.html (one file, no scripts) to --out and prints the table.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import shared
from perturbjax.analysis import paired_difference, print_table, save_results, write_report
from perturbjax.data import Dataset, epoch_order
from perturbjax.training import cost_ratios, device_data, fit, init_state
from perturbjax.training.step import as_arrays, compiled_step

PLAIN = "ce"


@dataclasses.dataclass(frozen=True)
class CompareSettings(shared.Settings):
    """Flags of compare.py."""

    methods: str = "ce, la, lpl(split=frequency), la+lpl, lpg(split=frequency), lpa(split=frequency), sam, pugd"
    """Methods, separated by commas: a name, settings in brackets, + for a chain. The first one is the reference."""
    seeds: int = 5
    """n: seeds 0 to n-1, each for the split of the data, the initialisation and every draw, the same for all methods."""
    out: str | None = None
    """Folder for results.json and report.html; runs/compare-DATA-VIEW if not given."""
    cost_rounds: int = 9
    """Rounds of the paired timing behind the cost ratio; 0: no timing."""


def main(argv: list[str]) -> None:
    """Runs the comparison."""
    settings = shared.first_flags(argv, CompareSettings, __doc__)
    methods = shared.parse_methods(settings.methods, settings.plugin)
    if settings.seeds < 1:
        raise ValueError(f"--seeds needs at least 1, got {settings.seeds}.")
    out = shared.prepare_out(settings.out, "compare", settings)
    seeds = range(settings.seeds)
    datasets = [shared.load_view(settings, seed) for seed in seeds]
    shared.check_runs(settings, datasets[0], methods)

    console = Console()
    started = time.perf_counter()
    histories = train_all(settings, datasets, methods, console)
    results = shared.results_of(settings, datasets, seeds, {t: shared.record(h, datasets) for t, h in histories.items()})
    reference = next(iter(methods))
    costs = measure_costs(settings, datasets[0], methods, settings.cost_rounds) if settings.cost_rounds else {}
    for typed, entry in results["methods"].items():
        entry["cost_ratio"] = costs.get(typed)
        if typed != reference:
            first = results["methods"][reference]["accuracy"]["values"]
            entry["difference"] = paired_difference(entry["accuracy"]["values"], first)
    save_results(results, out / "results.json")
    write_report(results, out / "report.html")
    print_table(results, console)
    took = time.perf_counter() - started
    console.print(f"{took:.0f} s. Wrote {out / 'results.json'} and {out / 'report.html'}", soft_wrap=True, highlight=False)


def train_all(settings: CompareSettings, datasets: list[Dataset], methods: dict, console: Console) -> dict:
    """{method as typed: [History of each seed]}."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    histories: dict[str, list] = {typed: [] for typed in methods}
    # Nothing is drawn where there is no terminal: a log file holds the table only.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = len(methods) * len(datasets) * settings.epochs
        bar = progress.add_task("", total=total)
        for typed, (method, numbers) in methods.items():
            for seed, dataset in enumerate(datasets):
                progress.update(bar, description=f"{typed}, seed {seed}")
                recipe = shared.make_recipe(settings, dataset, method)
                tick = lambda epoch, found: progress.advance(bar)
                try:
                    histories[typed].append(fit(recipe, dataset, shared.make_numbers(settings, numbers), seed, on_epoch=tick))
                except FloatingPointError as error:
                    raise FloatingPointError(f"{typed}: {error}") from error
    return histories


def measure_costs(settings: shared.Settings, dataset: Dataset, methods: dict, rounds: int) -> dict[str, float]:
    """Each method's step time over that of plain training, in paired rounds on the run's own data."""
    timed = dict(methods) if PLAIN in methods else {PLAIN: shared.parse_methods(PLAIN)[PLAIN], **methods}
    programs = {typed: stepper(settings, dataset, *what) for typed, what in timed.items()}
    began = time.perf_counter()
    jax.block_until_ready(programs[PLAIN]())
    jax.block_until_ready(programs[PLAIN]())
    once = (time.perf_counter() - began) / 2
    # Short steps are repeated within a round, so that a round is no shorter than the clock's and the scheduler's noise.
    steps = max(1, min(50, int(0.05 / max(once, 1e-4))))
    return cost_ratios(programs, PLAIN, rounds=rounds, steps=steps)


def stepper(settings: shared.Settings, dataset: Dataset, method: shared.Method, numbers: tuple):
    """A call that trains one more step on the first batch."""
    recipe, wanted = shared.make_recipe(settings, dataset, method), shared.make_numbers(settings, numbers)
    data = device_data(dataset)
    held = [init_state(recipe, wanted, data, 0)]
    step, arrays = compiled_step(recipe), as_arrays(wanted)
    index = jnp.asarray(epoch_order(recipe.num_examples, recipe.batch_size, 0, 0)[:1])

    def run():
        held[0], metrics, _ = step(held[0], arrays, data, index)
        return metrics["loss"]

    return run


if __name__ == "__main__":
    shared.start(main)
