"""How a method's accuracy depends on its settings: one compiled step for all values that are numbers, one plot per setting.

    python experiments/sweep.py --method "lpg(split=frequency)" --over "bound=0, 0.05, 0.1, 0.2; tau=20, 50, 80" --seeds 3 --out DIR
    python experiments/sweep.py --method "la+lpl" --over "lpl.bound=0.1, 0.3, 0.5; la.tau=0.5, 1, 2" --cross --out DIR
    python experiments/sweep.py --method "lpg(inference=pgd)" --over "num_steps=1, 3, 5" --out DIR    # structure: one compilation each

Settings vary one at a time, the others as given, or in all combinations with --cross. The first line of the table is --reference.
Writes what compare.py writes (results.json, report.html, table.md, a folder per run), and SETTING.svg for each setting of two numbers
or more. Interrupted in any way, the same command goes on there; more values cost only their own trainings. On GPU and TPU all runs of
one structure train side by side.
"""

import dataclasses
import itertools
import time

import jax
from rich.console import Console

from experiments import figures, shared
from experiments.shared import many
from perturbjax import spec, taxonomy
from perturbjax.analysis import print_table, save_results, write_markdown, write_report
from perturbjax.checks import check_number


@dataclasses.dataclass(frozen=True)
class SweepSettings(many.ManySettings):
    """Flags of sweep.py."""

    method: str = "lpg(split=frequency)"
    """The method: a name, settings in brackets, + for a chain."""
    over: str = "bound=0, 0.05, 0.1, 0.2"
    """Settings and their values, SETTING=VALUE, VALUE, ...; the next one after a semicolon. In a chain METHOD.SETTING, where several
    methods have it."""
    cross: bool = False
    """All combinations of the values; if not given, one setting at a time."""
    reference: str = "ce"
    """What the sweep is compared with."""
    cost_rounds: int = 0
    """Rounds of the paired timing behind the cost ratio; 0: no timing."""
    seeds: int = 3
    """n: seeds 0 to n-1, as in compare.py."""


Place = tuple[int, str]
"""A setting of a chain: (number of the call, name)."""


def main(argv: list[str]) -> None:
    """Runs the sweep."""
    settings = shared.first_flags(argv, SweepSettings, __doc__)
    check_number("--seeds", low=1, seeds=settings.seeds)
    typed, names = expand(settings)
    methods = shared.parse_methods(", ".join(dict.fromkeys([settings.reference, *typed])), settings.plugin)
    datasets = [shared.load_view(settings, seed) for seed in range(settings.seeds)]
    shared.check_runs(settings, datasets[0], methods, shared.channel_stats(settings))
    with shared.prepare_out(settings.out, "sweep", settings.view, shared.identity(settings, datasets[0])) as folder:
        console, started = Console(quiet=jax.process_index() > 0), time.perf_counter()
        shared.print_notes(datasets[0], console, settings, folder.path, notes=shared.notes_of(datasets))
        shared.print_classifiers(settings, methods, console)
        recipes = {shared.make_recipe(settings, datasets[0], method) for method, _ in methods.values()}
        console.print(f"{len(methods)} settings x {settings.seeds} seeds, {len(recipes)} compiled steps", highlight=False)
        histories, diverged = many.train_all(settings, datasets, methods, folder.path, console)
        results = many.summarise(settings, datasets, methods, histories, folder.path / "results.json")
        if jax.process_index() == 0:
            write_report(results, folder.path / "report.html")
            write_markdown(results, folder.path / "table.md")
            save_results(results, folder.path / "results.json")
        print_table(results, console)
        # A curve needs two numbers: words (split=accuracy) and what diverged make none.
        drawn = [name for name in names if len({value for _, value in figures.values_of(results["methods"], name)}) > 1]
        for name in drawn if jax.process_index() == 0 else ():
            figure = figures.Sensitivity(str(folder.path / "results.json"), name)
            (folder.path / f"{name}.svg").write_text(figures.draw_sensitivity(figure) + "\n")
        wrote = ", ".join(["results.json", "report.html", "table.md", *(f"{name}.svg" for name in drawn)])
        console.print(f"{time.perf_counter() - started:.0f} s. Wrote {wrote} to {folder.path}", soft_wrap=True, highlight=False)
        shared.raise_diverged(diverged)


def expand(settings: SweepSettings) -> tuple[list[str], list[str]]:
    """(every variant of the method as text, the settings' names: METHOD.SETTING where several methods of the chain have it)."""
    given = spec.parse_list(settings.method)
    if len(given) != 1:
        raise ValueError(f"--method needs one method, got {len(given)}. Chain with +.")
    registry = taxonomy.registry(settings.plugin)
    chain = spec.resolve(given[0][1], registry, taxonomy.helpers())  # positional settings by name, unknown ones are errors
    grid = [(find(chain, name, registry), values) for name, values in read_grid(settings.over)]
    if settings.cross:
        combinations = [list(zip([place for place, _ in grid], values)) for values in itertools.product(*(v for _, v in grid))]
    else:
        combinations = [[(place, value)] for place, values in grid for value in values]
    variants = [spec.canonical(with_settings(chain, wanted)) for wanted in combinations]
    having = lambda name: [call for call in chain if name in spec.setting_names(registry[call.name])]
    names = [name if len(having(name)) == 1 else f"{chain[number].name}.{name}" for (number, name), _ in grid]
    return list(dict.fromkeys(variants)), list(dict.fromkeys(names))


def read_grid(text: str) -> list[tuple[str, list]]:
    """[(setting, values)] of "a=1, 2; b=x"."""
    found = []
    for part in filter(str.strip, text.split(";")):
        name, equals, values = part.partition("=")
        if not equals or not values.strip():
            raise ValueError(f'--over needs SETTING=VALUE, VALUE, ..., got {part.strip()!r}. Write --over "bound=0.1, 0.2".')
        # Values are parsed as the command line's, those of a list of settings: varied(0.1, 0.2) is one value.
        [call] = spec.parse_chain(f"over({values})")
        found.append((name.strip(), list(call.args)))
    if not found:
        raise ValueError('--over needs at least one setting, got none. Write --over "bound=0.1, 0.2".')
    return found


def find(chain: tuple[spec.Call, ...], name: str, registry: dict) -> Place:
    """Where the setting NAME or METHOD.NAME is; an error unless exactly one call of the chain has it."""
    method, _, setting = name.rpartition(".")
    have = lambda call: setting in spec.setting_names(registry[call.name])
    places = [i for i, call in enumerate(chain) if have(call) and method in ("", call.name)]
    if len(places) != 1:
        known = sorted({f"{call.name}.{s}" for call in chain for s in spec.setting_names(registry[call.name])})
        raise ValueError(
            f"--over needs a setting of exactly one method, got {name!r} of {len(places)}. There are {', '.join(known)}."
        )
    return places[0], setting


def with_settings(chain: tuple[spec.Call, ...], wanted: list[tuple[Place, object]]) -> tuple[spec.Call, ...]:
    """The chain with these settings instead of its own."""
    calls = list(chain)
    for (number, name), value in wanted:
        kept = dict(calls[number].kwargs) | {name: value}
        calls[number] = dataclasses.replace(calls[number], kwargs=tuple(kept.items()))
    return tuple(calls)


if __name__ == "__main__":
    shared.start(main)
