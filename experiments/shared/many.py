"""Several methods with several seeds: planned, trained, one after the other or side by side, timed and summed up.

Every run has a folder of its own, OUT/runs/METHOD/seed-N; a group of runs that share a program trains in a common one until it is done.
"""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import shared
from perturbjax.analysis import paired_difference, save_results
from perturbjax.data import Dataset
from perturbjax.training import Checkpoints, History, Recipe, Run, RunFolder, TimedStep, cost_ratios, first_batch, fit_many
from perturbjax.training.devices import to_host
from perturbjax.training.folder import keep_model
from perturbjax.training.loop import extra_gradients

PLAIN = "ce"

SAME_WORK = 0.15
"""Gradient evaluations a step by which the timed steps may differ from the run's, for periods that don't divide both."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings(shared.Settings):
    """Flags of the scripts that train several methods with several seeds."""

    seeds: int = 5
    """n: seeds 0 to n-1, each for the split of the data, the initialisation and every draw, the same for all methods."""
    out: str | None = None
    """Folder for results.json and report.html; runs/compare-DATA-VIEW if not given."""
    vmapped: bool | None = None
    """Train all seeds and settings of one structure side by side; if not given: on GPU and TPU."""


@dataclasses.dataclass(frozen=True)
class ManySettings(TrainingSettings):
    """Flags of those that time them, too."""

    cost_rounds: int = 9
    """Rounds of the paired timing behind the cost ratio; 0: no timing."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of the comparison."""

    typed: str
    recipe: Recipe
    run: Run
    folder: pathlib.Path
    identity: dict

    @property
    def name(self) -> str:
        """For people and for the folders of groups."""
        return f"{self.typed}, seed {self.run.seed}"


def plan(settings: TrainingSettings, datasets: list[Dataset], methods: dict, out: pathlib.Path) -> list[Planned]:
    """All runs, method by method."""
    planned, kept = [], [shared.identity(settings, dataset) for dataset in datasets]  # once: it reads the images
    for typed, (method, numbers) in methods.items():
        for seed, dataset in enumerate(datasets):
            what = kept[seed] | shared.method_identity(typed, settings.plugin) | {"seed": seed}
            run = Run(dataset, shared.make_numbers(settings, numbers), seed, typed)
            place = shared.run_place(out, typed) / f"seed-{seed}"
            planned.append(
                Planned(typed, shared.make_recipe(settings, dataset, method, shared.channel_stats(settings)), run, place, what)
            )
    return planned


def train_all(
    settings: TrainingSettings, datasets: list[Dataset], methods: dict, out: pathlib.Path, console: Console
) -> tuple[dict, list[str]]:
    """({method as typed: [History of each seed]}, what became of the methods that diverged and are missing there).

    Takes the folders of the runs that are finished and trains the others. A method that diverges stops none but itself.
    Raises FloatingPointError if it is the first one, which the others are compared with.
    """
    planned, histories, diverged = plan(settings, datasets, methods, out), {}, {}
    for one in planned:
        with RunFolder(one.folder) as folder:
            folder.claim(one.identity)
            if (history := shared.finished_run(folder)) is not None:
                histories[one.folder] = history
    begun = begun_groups(planned, out)
    taken = {one.folder for group in begun for one in group}
    left = [one for one in planned if one.folder not in histories and one.folder not in taken]
    together = jax.default_backend() != "cpu" if settings.vmapped is None else settings.vmapped
    waiting = [*begun, *(groups(left) if together else [[one] for one in left])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    # Nothing is drawn where there is no terminal: a log file holds the table only.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(planned) * settings.epochs, completed=len(histories) * settings.epochs)
        while waiting:
            group = waiting.pop(0)
            if len(group) == 1 and group[0].typed in diverged:
                continue
            names = ", ".join(dict.fromkeys(one.typed for one in group))
            progress.update(
                bar, description=f"{names}, seed {', '.join(str(s) for s in sorted({one.run.seed for one in group}))}"
            )
            tick = lambda epoch, found, n=len(group): progress.advance(bar, n)
            try:
                histories |= train_group(settings, group, out, tick)
            except FloatingPointError as error:
                if len(group) > 1:  # which of them, and what the others give: one by one
                    shutil.rmtree(common_folder(group, out))
                    waiting[:0] = [[one] for one in group]
                elif group[0].typed == next(iter(methods)):
                    raise
                else:
                    diverged[group[0].typed] = str(error)
    kept = [typed for typed in methods if typed not in diverged]
    return {typed: [histories[one.folder] for one in planned if one.typed == typed] for typed in kept}, list(diverged.values())


def groups(planned: list[Planned]) -> list[list[Planned]]:
    """Runs that share one compiled program, whatever their method's name and numbers."""
    found: dict[Recipe, list[Planned]] = {}
    for one in planned:
        found.setdefault(one.recipe, []).append(one)
    return list(found.values())


def begun_groups(planned: list[Planned], out: pathlib.Path) -> list[list[Planned]]:
    """Groups that an interrupted comparison left behind, as long as all their runs are still wanted: they go on as they began."""
    by_name, found = {one.name: one for one in planned}, []
    for file in sorted(out.glob("runs/together-*/run.json")):
        names = json.loads(file.read_text())["settings"]["runs"]
        if all(name in by_name for name in names):
            found.append([by_name[name] for name in names])
    return found


def common_folder(group: list[Planned], out: pathlib.Path) -> pathlib.Path:
    """Where a group of runs trains."""
    if len(group) == 1:
        return group[0].folder
    return out / "runs" / f"together-{shared.digest('; '.join(one.name for one in group))}"


def train_group(settings: TrainingSettings, group: list[Planned], out: pathlib.Path, tick: Callable) -> dict:
    """{folder: History}. One run trains in its own folder; several in a common one, until they are finished."""
    names, common = [one.name for one in group], common_folder(group, out)
    with RunFolder(common) as folder:
        folder.claim(group[0].identity if len(group) == 1 else {"runs": names, **group[0].identity})
        try:
            histories = fit_many(
                group[0].recipe, [one.run for one in group], on_epoch=tick, folder=folder,
                options=shared.options(settings, out if len(group) > 1 else folder.path),
            )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(f"{', '.join(dict.fromkeys(one.typed for one in group))}: {error}") from error
        for one, history in zip(group, histories, strict=True):
            if len(group) > 1:
                split_off(one, history, common)
            if jax.process_index() == 0:
                history.save(one.folder / "finished.npz")
            history.state = None  # the checkpoint has it; those of all runs together may not fit on the device
    if len(group) > 1 and jax.process_index() == 0:
        shutil.rmtree(common)
    return {one.folder: history for one, history in zip(group, histories, strict=True)}


def split_off(one: Planned, history: History, common: pathlib.Path) -> None:
    """Gives a run of a group what a run of its own would have left: its last checkpoint, its log, its net's description."""
    progress = dict(history.progress or {})
    if jax.process_index() == 0:
        one.folder.mkdir(parents=True, exist_ok=True)
        keep_model(one.folder, one.recipe.model)
        lines = [json.loads(line) for line in (common / "metrics.jsonl").read_text().splitlines()]
        own = [line for line in lines if (line["method"], line["seed"]) == (one.typed, one.run.seed)]
        log = one.folder / "metrics.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in own))
        progress["log_size"] = log.stat().st_size  # what a run that goes on from here keeps of it
    with Checkpoints(one.folder / "checkpoints") as checkpoints:  # in every process: they write together
        checkpoints.save(one.recipe.total_steps, to_host(history.state), progress)


def summarise(settings: ManySettings, datasets: list[Dataset], methods: dict, histories: dict, file: pathlib.Path) -> dict:
    """results.json of the finished runs, with each method's cost and its difference to the first one.

    It is written to `file` without the costs before they are measured, so that an error there loses nothing.
    """
    results = shared.results_of(settings, datasets, range(settings.seeds), histories)
    results["settings"]["head"] = settings.head or shared.classifiers(
        settings, methods
    )  # as it came out, where it is not the same for all
    reference = next(iter(methods))
    for typed, entry in results["methods"].items():
        if typed != reference:
            first = results["methods"][reference]
            for difference, key in (("difference", "accuracy"), ("balanced_difference", "balanced_accuracy")):
                entry[difference] = paired_difference(entry[key]["values"], first[key]["values"])
    if not settings.cost_rounds:
        return results
    if jax.process_index() == 0:
        save_results(results, file)
    for typed, (ratio, evaluations) in measure_costs(settings, datasets[0], methods, settings.cost_rounds).items():
        # The first steps are timed: they say nothing of a method that does more, or less, in another part of the run.
        if (entry := results["methods"].get(typed)) and abs(evaluations - entry["gradient_evaluations"]) < SAME_WORK:
            entry["cost_ratio"] = ratio
    results["timed"] = True
    return results


def measure_costs(settings: shared.Settings, dataset: Dataset, methods: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """(step time over that of plain training, gradient evaluations a step) of each method, in paired rounds on the run's own data."""
    timed = dict(methods) if PLAIN in methods else {PLAIN: shared.parse_methods(PLAIN)[PLAIN], **methods}
    recipe = lambda method: shared.make_recipe(settings, dataset, method, shared.channel_stats(settings))
    batch = first_batch(recipe(timed[PLAIN][0]), dataset, settings.stream)
    programs = {
        typed: TimedStep(recipe(method), shared.make_numbers(settings, numbers), dataset, batch=batch)
        for typed, (method, numbers) in timed.items()
    }
    began = time.perf_counter()
    jax.block_until_ready(programs[PLAIN]())
    jax.block_until_ready(programs[PLAIN]())
    once = (time.perf_counter() - began) / 2
    # Short steps are repeated within a round, so that a round is no shorter than the clock's and the scheduler's noise.
    steps = max(1, min(50, int(0.05 / max(once, 1e-4))))
    ratios = cost_ratios(programs, PLAIN, rounds=rounds, steps=steps)
    evaluations = lambda state: 1 + extra_gradients(state.opt_state) / int(state.step)
    return {typed: (ratio, evaluations(programs[typed].state)) for typed, ratio in ratios.items()}
