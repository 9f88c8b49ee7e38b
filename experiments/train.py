"""Trains one method with one seed.

    python experiments/train.py --method "la+lpl(bound=varied)" --seed 3 --out DIR
    python experiments/train.py --list

Writes to --out: metrics.jsonl (a line per epoch), checkpoints/, and at the end results.json (the form of compare.py's, with one method
and one seed) and report.html; prints the table. Interrupted in any way, the same command goes on from the last checkpoint and ends
with the same numbers, bit for bit; on a finished folder it prints the results.
"""

import dataclasses

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import shared
from perturbjax.analysis import print_table, save_results, write_report
from perturbjax.checks import check_number
from perturbjax.training import History, fit


@dataclasses.dataclass(frozen=True)
class TrainSettings(shared.Settings):
    """Flags of train.py."""

    method: str = "ce"
    """A name, settings in brackets, + for a chain."""
    seed: int = 0
    """Of the data's split, the initialisation and every draw."""
    out: str | None = None
    """Folder for results.json and report.html; runs/train-DATA-VIEW if not given."""
    attack: str = "none"
    """Accuracy of the finished nets under attack too: pgd(bound=8/255, num_steps=20), universal(bound=8/255, epochs=5),
    class_universal; separated by commas. Works on runs that are finished already."""


def main(argv: list[str]) -> None:
    """Runs the training."""
    settings = shared.first_flags(argv, TrainSettings, __doc__)
    methods = shared.parse_methods(settings.method, settings.plugin)
    if len(methods) != 1:
        raise ValueError(
            f"--method needs one method, got {len(methods)}. Chain with +, or use compare.py --methods for several."
        )
    check_number("--seed", low=0, seed=settings.seed)
    [(typed, (method, numbers))] = methods.items()
    dataset = shared.load_view(settings, settings.seed)
    shared.check_runs(settings, dataset, methods, shared.channel_stats(settings))
    attacks = shared.attacks_of(settings, dataset)
    with shared.prepare_out(settings.out, "train", settings.view, shared.identity(settings, dataset, method=typed)) as folder:
        console, results_file = Console(quiet=jax.process_index() > 0), folder.path / "results.json"
        shared.print_notes(dataset, console, settings, folder.path, notes=shared.notes_of([dataset]))
        history, results = shared.finished_run(folder), shared.read_results(results_file)
        if history is not None and results is not None and shared.attacked_before(results, attacks):
            print_table(results, console)
            console.print(shared.finished_before(results, results_file), soft_wrap=True, highlight=False)
            return
        if history is None:
            history = train(
                settings,
                shared.make_recipe(settings, dataset, method, shared.channel_stats(settings)),
                dataset,
                numbers,
                folder,
                console,
            )
        before = results["methods"][typed].get("attacks") or {} if results is not None else {}
        results = shared.results_of(settings, [dataset], [settings.seed], {typed: [history]})
        if jax.process_index() == 0:
            history.save(folder.finished)
            if attacks or before:
                found = shared.attacked(attacks, [(folder.path, dataset, settings.seed)], console)
                results["methods"][typed]["attacks"] = before | found
            write_report(results, folder.path / "report.html")
            save_results(results, results_file)
        print_table(results, console)
        console.print(f"Wrote {results_file} and {folder.path / 'report.html'}", soft_wrap=True, highlight=False)


def train(settings: TrainSettings, recipe, dataset, numbers, folder, console: Console) -> History:
    """The run, with its progress on the terminal."""
    columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=settings.epochs)
        tested = lambda found: f", test accuracy {100 * found['accuracy']:.1f}" if "accuracy" in found else ""
        describe = lambda found: f"loss {found['loss']:.3f}{tested(found)}"
        tick = lambda epoch, found: progress.update(bar, completed=epoch + 1, description=describe(found))
        return fit(
            recipe, dataset, shared.make_numbers(settings, numbers), settings.seed, on_epoch=tick, folder=folder,
            options=shared.options(settings, folder.path),
        )  # fmt: skip


if __name__ == "__main__":
    shared.start(main)
