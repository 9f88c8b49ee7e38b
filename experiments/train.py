"""Trains one method with one seed.

    python experiments/train.py --method "la+lpl(bound=varied)" --seed 3 --out DIR
    python experiments/train.py --list

Writes results.json (the form of compare.py's, with one method and one seed) and report.html to --out, and prints the table.
"""

import dataclasses

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import shared
from perturbjax.analysis import print_table, save_results, write_report
from perturbjax.training import fit


@dataclasses.dataclass(frozen=True)
class TrainSettings(shared.Settings):
    """Flags of train.py."""

    method: str = "ce"
    """A name, settings in brackets, + for a chain."""
    seed: int = 0
    """Of the data's split, the initialisation and every draw."""
    out: str | None = None
    """Folder for results.json and report.html; runs/train-DATA-VIEW if not given."""


def main(argv: list[str]) -> None:
    """Runs the training."""
    settings = shared.first_flags(argv, TrainSettings, __doc__)
    methods = shared.parse_methods(settings.method, settings.plugin)
    if len(methods) != 1:
        raise ValueError(
            f"--method needs one method, got {len(methods)}. Chain with +, or use compare.py --methods for several."
        )
    if settings.seed < 0:
        raise ValueError(f"--seed needs a number of at least 0, got {settings.seed}.")
    out = shared.prepare_out(settings.out, "train", settings)
    dataset = shared.load_view(settings, settings.seed)
    shared.check_runs(settings, dataset, methods)

    console = Console()
    [(typed, (method, numbers))] = methods.items()
    recipe = shared.make_recipe(settings, dataset, method)
    columns = (TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=settings.epochs)
        describe = lambda found: f"loss {found['loss']:.3f}, test accuracy {100 * found['accuracy']:.1f}"
        tick = lambda epoch, found: progress.update(bar, advance=1, description=describe(found))
        history = fit(recipe, dataset, shared.make_numbers(settings, numbers), settings.seed, on_epoch=tick)
    results = shared.results_of(settings, [dataset], [settings.seed], {typed: shared.record([history], [dataset])})
    save_results(results, out / "results.json")
    write_report(results, out / "report.html")
    print_table(results, console)
    console.print(f"Wrote {out / 'results.json'} and {out / 'report.html'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    shared.start(main)
