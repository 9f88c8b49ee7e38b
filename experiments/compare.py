"""Trains several methods over the same seeds and the same splits, and says which helps, by how much, at what cost.

    python experiments/compare.py                                                        # the embedded digits, long-tailed
    python experiments/compare.py --methods "ce, la, lpl(bound=varied), sam+lpg" --seeds 5 --out DIR
    python experiments/compare.py --data CIFAR10.npz --view "longtail(100)" --model resnet20 --batch-size 128 --methods "ce, lpl"
    python experiments/compare.py --methods "ce, at, uat, cuat" --attack "pgd, universal" # and how they stand attacks
    python experiments/compare.py --list                                                 # all methods
    python experiments/compare.py --config small_longtail --data CIFAR10.npz             # a protocol from experiments/configs
    python experiments/compare.py --config small_longtail --smoke                        # its small version, on digits

Writes results.json, report.html (one file, no scripts) and table.md to --out and prints the table. Every run has a folder of its own below
--out/runs, with its log and checkpoints: interrupted in any way, the same command goes on there; finished runs are not trained again,
also when methods or seeds are added.
"""

import dataclasses
import pathlib
import time

import jax
from rich.console import Console

from experiments import shared
from experiments.shared import many
from perturbjax.analysis import print_table, save_results, write_markdown, write_report
from perturbjax.checks import check_number


@dataclasses.dataclass(frozen=True)
class CompareSettings(many.ManySettings):
    """Flags of compare.py."""

    methods: str = "ce, la, lpl(split=frequency), la+lpl, lpg(split=frequency), lpa(split=frequency), sam, pugd"
    """Methods, separated by commas: a name, settings in brackets, + for a chain. The first one is the reference."""
    attack: str = "none"
    """Accuracy of the finished nets under attack too: pgd(bound=8/255, num_steps=20), universal(bound=8/255, epochs=5),
    class_universal; separated by commas. Works on runs that are finished already."""


def main(argv: list[str]) -> None:
    """Runs the comparison."""
    settings = shared.first_flags(argv, CompareSettings, __doc__)
    methods = shared.parse_methods(settings.methods, settings.plugin)
    check_number("--seeds", low=1, seeds=settings.seeds)
    seeds = range(settings.seeds)
    datasets = [shared.load_view(settings, seed) for seed in seeds]
    shared.check_runs(settings, datasets[0], methods, shared.channel_stats(settings))
    attacks = shared.attacks_of(settings, datasets[0])
    with shared.prepare_out(settings.out, "compare", settings.view, shared.identity(settings, datasets[0])) as folder:
        console = Console(quiet=jax.process_index() > 0)
        shared.print_notes(datasets[0], console, settings, folder.path, notes=shared.notes_of(datasets))
        shared.print_classifiers(settings, methods, console)
        results_file, report = folder.path / "results.json", folder.path / "report.html"
        started = time.perf_counter()
        results, diverged = finished(settings, results_file, list(methods), list(seeds)), []
        wrote = "" if results is None else shared.finished_before(results, results_file)
        if results is None or not shared.attacked_before(results, attacks):
            histories, diverged = many.train_all(settings, datasets, methods, folder.path, console)
            results = results or many.summarise(settings, datasets, methods, histories, results_file)
            attack_all(attacks, many.plan(settings, datasets, methods, folder.path), results, console)
            if jax.process_index() == 0:
                write_report(results, report)
                write_markdown(results, folder.path / "table.md")
                save_results(results, results_file)
            wrote = f"{time.perf_counter() - started:.0f} s. Wrote {results_file} and {report}"
        print_table(results, console)
        console.print(wrote, soft_wrap=True, highlight=False)
        shared.raise_diverged(diverged)


def attack_all(attacks: dict, planned: list[many.Planned], results: dict, console: Console) -> None:
    """Adds the nets' accuracies under attack to the results, which may be those of an earlier command without them."""
    if not attacks:
        return
    results["command"], results["settings"]["attack"] = shared.command_line(), ", ".join(attacks)
    for typed, entry in results["methods"].items():
        runs = [(one.folder, one.run.dataset, one.run.seed) for one in planned if one.typed == typed]
        entry["attacks"] = {**(entry.get("attacks") or {}), **shared.attacked(attacks, runs, console)}


def finished(settings: CompareSettings, file: pathlib.Path, methods: list[str], seeds: list[int]) -> dict | None:
    """The results that are there already, if they are of these methods and seeds."""
    found = shared.read_results(file)
    if found is None:
        return None
    same = list(found["methods"]) == methods and found["settings"]["seeds"] == seeds
    return found if same and (found.get("timed") or not settings.cost_rounds) else None


if __name__ == "__main__":
    shared.start(main)
