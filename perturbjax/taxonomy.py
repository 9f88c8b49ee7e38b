"""The taxonomy of learning with perturbation, read off the methods themselves.

    python -m perturbjax.taxonomy [--format text|markdown|json]

Rows are targets and granularities, columns inference manners (taxonomy paper, Table 1 and section 4); the sign after a name is
the direction: + raises the loss, − lowers it, ± both, · none fixed. A cell that is empty is a method nobody has written here yet.
"""

import argparse
import json
from collections.abc import Callable, Mapping

import perturbjax
from perturbjax.core import GRANULARITIES, INFERENCES, TARGETS


def methods() -> dict[str, Callable]:
    """Every exported method by its name, in the order of the forward and backward pass; `ce` is the empty chain."""
    return {"ce": perturbjax.ce, **{f.__name__: f for f in vars(perturbjax).values() if hasattr(f, "coordinates")}}


def registry() -> dict[str, Callable]:
    """Every method by its name and by its short name on the command line."""
    found = methods()
    return found | {f.alias: f for f in found.values() if getattr(f, "alias", None)}


def helpers() -> dict[str, Callable]:
    """The values that settings may be made of: `bound=varied(0.5)`, `split=by_frequency(0.4)`."""
    names = ("varied", "varied_by_frequency", "layer_scaled", "by_accuracy", "by_frequency", "by_variance", "all_classes")
    return {name: getattr(perturbjax, name) for name in names}


def sign(direction: tuple[int, ...]) -> str:
    """The direction as one character."""
    return {(): "·", (1,): "+", (-1,): "−"}.get(direction, "±")


def table(found: Mapping[str, Callable] | None = None) -> list[dict]:
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


def describe() -> list[dict]:
    """Coordinates, source and first line of the docstring of every method."""
    return [
        {
            "name": name,
            "alias": factory.alias,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in factory.coordinates._asdict().items()},
            "cite": factory.cite,
            "summary": factory.__doc__.strip().splitlines()[0],
        }
        for name, factory in methods().items()
        if hasattr(factory, "coordinates")
    ]


def _print_text(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Learning with perturbation: what is here")
    for head in ("target", "granularity", *INFERENCES):
        shown.add_column(head.replace("hyper-parameter", "hyper-par."))
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["target"] != row["target"]
        last = i + 1 == len(rows) or rows[i + 1]["target"] != row["target"]
        cells = ["\n".join(row[i]) for i in INFERENCES]
        shown.add_row(row["target"] if first else "", row["granularity"], *cells, end_section=last)
    console = Console()
    console.print(shown)
    console.print("+ raises the loss, − lowers it, ± both, · no fixed sign")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m perturbjax.taxonomy", description="The taxonomy table of the methods here.")
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    chosen = parser.parse_args().format
    rows = table()
    if chosen == "text":
        _print_text(rows)
    elif chosen == "markdown":
        print(markdown(rows))
    else:
        print(json.dumps({"table": rows, "methods": describe()}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
