"""The taxonomy of learning with perturbation, read off the methods themselves.

    python -m perturbjax.taxonomy [--format text|markdown|json] [--plugin my_method.py]

Rows are targets and granularities, columns inference manners (taxonomy paper, Table 1 and section 4); the sign after a name is
the direction: + raises the loss, − lowers it, ± both, · none fixed. A cell that is empty is a method nobody has written here yet.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import perturbjax
from perturbjax.method import GRANULARITIES, INFERENCES, TARGETS


def methods(plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Every exported method by its name, in the order of the forward and backward pass; `ce` is the empty chain.

    Args:
      plugins: paths of Python files with methods of your own (functions under @pj.method), which come last.
    """
    own = [f for f in vars(perturbjax).values() if hasattr(f, "coordinates")]
    own.sort(key=lambda f: TARGETS.index(f.coordinates.target[0]))
    found = {"ce": perturbjax.ce, **{f.__name__: f for f in own}}
    for path in plugins:
        found |= _plugin(str(path))
    return found


@functools.cache
def _plugin(path: str) -> dict[str, Any]:
    if not pathlib.Path(path).is_file():
        raise ValueError(f"plugin needs a Python file, got {path!r}, which isn't there. Check the path.")
    spec = importlib.util.spec_from_file_location(f"perturbjax_plugin_{pathlib.Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    # Its own functions only: a plugin may import methods of the package to build on.
    own = [f for f in vars(module).values() if hasattr(f, "coordinates") and f.__module__ == module.__name__]
    if not own:
        raise ValueError(f"plugin needs at least one function under @pj.method(...), got none in {path}. Decorate yours.")
    return {f.__name__: f for f in own}


def registry(plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Every method by its name and by its short name on the command line."""
    found = methods(plugins)
    found |= {"erm": perturbjax.ce}  # what domain generalization calls it
    return found | {f.alias: f for f in found.values() if getattr(f, "alias", None)}


def helpers() -> dict[str, Any]:
    """The values that settings may be made of: `bound=varied(0.5)`, `split=by_frequency(0.4)`."""
    names = ("varied", "varied_by_frequency", "layer_scaled", "by_accuracy", "by_frequency", "by_variance", "all_classes")
    names += ("head_tail_steps", "proportional_steps")
    names += ("always", "never", "after", "last", "every", "plateau", "cosine", "linear", "by_rate")
    return {name: getattr(perturbjax, name) for name in names}


def sign(direction: tuple[int, ...]) -> str:
    """The direction as one character."""
    return {(): "·", (1,): "+", (-1,): "−"}.get(direction, "±")


def table(found: Mapping[str, Any] | None = None) -> list[dict]:
    """One row for each pair of target and granularity that has a method: {"target", "granularity", inference: [names]}."""
    found = methods() if found is None else found
    rows = []
    for target in TARGETS:
        for granularity in GRANULARITIES:
            cells = {inference: [] for inference in INFERENCES}
            for name, factory in found.items():
                at = getattr(factory, "coordinates", None)
                if at and target in at.target and granularity in at.granularity:
                    cells[at.inference].append(f"{factory.alias or name}{sign(at.direction)}")
            if any(cells.values()):
                rows.append({"target": target, "granularity": granularity, **cells})
    return rows


def markdown(rows: list[dict]) -> str:
    """The table as Markdown."""
    head = ["target", "granularity", *INFERENCES]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row["target"], row["granularity"], *(", ".join(row[i]) for i in INFERENCES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(found: Mapping[str, Any] | None = None) -> list[dict]:
    """Coordinates, source and first line of the docstring of every method."""
    found = methods() if found is None else found
    return [
        {
            "name": name,
            "alias": factory.alias,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in factory.coordinates._asdict().items()},
            "cite": factory.cite,
            "summary": factory.__doc__.strip().splitlines()[0],
        }
        for name, factory in found.items()
        if hasattr(factory, "coordinates")
    ]


def _print_text(rows: list[dict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Narrow enough for 80 columns with the longest name there is.
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    broken = {"hyper-parameter": "hyper-\nparameter", "regularised": "regular-\nised", "adversarial": "adver-\nsarial"}
    for head in ("target", "granularity", *INFERENCES):
        shown.add_column(broken.get(head, head))
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["target"] != row["target"]
        cells = ["\n".join(row[inference]) for inference in INFERENCES]
        shown.add_row(row["target"] if first else "", row["granularity"], *cells)
    console = Console()
    console.print(shown)
    console.print("+ raises the loss, − lowers it, ± both, · no fixed sign")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m perturbjax.taxonomy", description="The taxonomy table of the methods here."
    )
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    parser.add_argument("--plugin", action="append", default=[], help="a Python file with methods of your own")
    chosen = parser.parse_args()
    try:
        found = methods(chosen.plugin)
    except ValueError as error:
        parser.error(str(error))
    rows = table(found)
    if chosen.format == "text":
        _print_text(rows)
    elif chosen.format == "markdown":
        print(markdown(rows))
    else:
        print(json.dumps({"table": rows, "methods": describe(found)}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
