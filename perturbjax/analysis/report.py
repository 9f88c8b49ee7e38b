"""A comparison's results, to be read: a table for the terminal, one self-contained page, and results.json.

`results` is what results.json holds: {"command", "versions", "data", "settings", "methods": {name: numbers}};
accuracies are fractions, missing numbers None, the first method is the reference. Tables show percent. Where the test set is not balanced
("test_balanced" of the data is False), balanced accuracy takes the place of accuracy: it comes first, orders the methods and is what the
differences are of. The page has no script and fetches nothing, and the same results give the same bytes.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perturbjax.analysis.ranking import difference_of, headline, num_untested, ordered

ATTACK = "attack "  # before what was typed, a column's key
NAME_ROOM = 17
"""Characters of a name for which a narrow table gives up columns; longer ones are folded."""

GROUPS = ("head", "medium", "tail")
ASCII_HEAD = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # only a line below the header


def save_results(results: dict, path: str | os.PathLike) -> Path:
    """Writes results as strict JSON (nan and infinity become null, arrays lists), at once: nobody reads half a file."""
    text = json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    flat = lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]"  # a list of numbers on one line
    return _write(re.sub(r"\[\n\s+([^\[\]{}\"]*?)\n\s+\]", flat, text) + "\n", path)


def load_results(path: str | os.PathLike) -> dict:
    """The results that `save_results` wrote. NaN and Infinity, which are not JSON, are refused."""

    def refuse(constant):
        raise ValueError(
            f"load_results needs strict JSON, got {constant} in {path}. "
            "Write the file with save_results(results, path), which puts null there."
        )

    return _checked("load_results", json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse))


def table(results: dict, *, ascii: bool = False, wide: bool = False, width: int | None = None) -> Table:
    """One row per method, as a rich table: accuracies, rare classes, difference to the first method, cost.

    Columns without any number are left out. Long names are folded, so that 80 characters are enough; where there are attacks, the
    narrow table leaves out their spread, the gradients and the seconds.

    Args:
      ascii: plain characters only, +/- for ±, for terminals that can't show more. wide: more room between the columns.
      width: characters; where they are too few for names of 17, seconds and then gradients are left out.
    """
    results = _checked("table", results)
    signs = ("+/-", "-", "-") if ascii else ("±", "-", "–")
    names, columns, note = _columns(results, *signs, narrow=not wide, brief=True, width=width)
    plain = lambda text: Text(text.encode("ascii", "backslashreplace").decode() if ascii else text)
    out = Table(
        box=ASCII_HEAD if ascii else box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1) if wide else 0,
        pad_edge=False,
        caption=plain(note),
        caption_justify="left",
    )
    out.add_column("method", overflow="fold")
    for title in columns:
        out.add_column(title, justify="right", no_wrap=True)
    for i, name in enumerate(names):
        out.add_row(plain(name), *(Text(cells[i]) for cells in columns.values()))
    return out


def _fitting(columns: dict[str, list[str]], names: list[str], width: int, gap: int) -> dict[str, list[str]]:
    """The columns without those that give way first, as far as the names need the room."""
    longest = min(max(map(len, names)), NAME_ROOM)
    needed = lambda: longest + sum(gap + max(map(len, [title, *cells])) for title, cells in columns.items())
    for title in ("secs", "grads"):
        if needed() > width:
            columns = {other: cells for other, cells in columns.items() if other != title}
    return columns


def markdown(results: dict) -> str:
    """`table` in Markdown, under the command that made it, for notes and documents."""
    results = _checked("markdown", results)
    names, columns, note = _columns(results)
    rows = [["method", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[f"`{name}`", *(cells[i] for cells in columns.values())] for i, name in enumerate(names)]
    lines = [f"    {results['command']}", ""] if results.get("command") else []
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", note[:1].upper() + note[1:] + "."]) + "\n"


def _columns(
    results: dict,
    plus_minus: str = "±",
    minus: str = "−",
    none: str = "–",
    *,
    narrow: bool = False,
    brief: bool = False,
    width: int | None = None,
) -> tuple[list[str], dict[str, list[str]], str]:
    """(methods, {title: one text for each}, what the columns mean), without the columns that have no number at all.

    brief: the spread of the headline only. width: characters that the table may have.
    """
    cells, seeds, first = text_cells(results, plus_minus, minus, none), num_seeds(results), next(iter(results["methods"]))
    key, mean_only = headline(results), lambda column: [cell.split(f" {plus_minus}")[0] for cell in column]
    other = "accuracy" if key == "balanced_accuracy" else "balanced_accuracy"
    title = {key: key.removesuffix("_accuracy"), other: "acc." if other == "accuracy" else "bal.", "macro_f1": "F1"}
    title |= {"head": "head", "medium": "med.", "tail": "tail", "memorised": "memo."}
    attacks = attack_titles(results)
    if attacks and narrow:
        cells = {name: column for name, column in cells.items() if name not in ("gradient_evaluations", "seconds")}
        cells |= {name: mean_only(cells[name]) for name in attacks}
    if brief:
        cells |= {name: mean_only(cells[name]) for name in (other,) if name in cells}
    title |= attacks
    title |= {"difference": "difference"}
    title |= {"cost_ratio": "cost", "gradient_evaluations": "grads", "seconds": "secs"}
    names, place = ordered(results), list(results["methods"])
    rows = [place.index(name) for name in names]
    columns = {title[name]: [cells[name][i] for i in rows] for name in title if name in cells}
    if width is not None:
        columns = _fitting(columns, names, width, 1 if narrow else 2)
    note = f"{key.replace('_', ' ')} in % at the last epoch, {f'mean {plus_minus} std over {seeds} seeds' if seeds > 1 else 'one seed'}"
    note += ", which orders the methods since the test set is not balanced" * (key != "accuracy")
    note += "; acc.: accuracy" if key != "accuracy" else "; bal.: balanced accuracy, the mean over classes" * (other in cells)
    note += "; F1: macro F1" * ("macro_f1" in cells)
    untested = num_untested(results)
    note += (
        f"; {untested} of {len(results['data']['class_counts'])} classes have no test sample and are in no mean"
        if untested
        else ""
    )
    if "difference" in cells:
        note += f"; difference to {first} in {'points' if key == 'accuracy' else 'points of balanced accuracy'}"
        note += ", [95 % interval, paired over seeds]" * (seeds > 1)
    note += "; memo.: wrong training labels that the net has learnt" * ("memorised" in cells)
    note += "".join(f"; {short}: accuracy under {name.removeprefix(ATTACK)}" for name, short in attacks.items())
    note += "; cost: times plain training" * ("cost_ratio" in cells)
    note += "; grads: gradient evaluations a step" * ("grads" in columns)
    return names, columns, note


def print_table(results: dict, console: Console | None = None) -> None:
    """Prints `table` to a console (None: standard output); plain characters where the encoding is not UTF."""
    console = console or Console()
    utf = console.encoding.lower().startswith("utf")
    console.print(table(results, ascii=not utf, wide=console.width >= 100, width=console.width))


def write_markdown(results: dict, path: str | os.PathLike) -> Path:
    """Writes `markdown` to a file."""
    return _write(markdown(results), path)


def write_report(results: dict, path: str | os.PathLike) -> Path:
    """Writes the page: what was trained, the table, the figures, and how to read them. Needs nothing but a browser."""
    from perturbjax.analysis.page import page  # matplotlib takes most of a second to import

    return _write(page(_checked("write_report", results)), path)


# Numbers as text ------------------------------------------------------------------------------------------------------


def text_cells(results: dict, plus_minus: str = "±", minus: str = "−", none: str = "–") -> dict[str, list[str]]:
    """{column: one text per method}, without the columns that have no number at all; but a group of classes keeps its own."""
    number = lambda x, form: none if x is None else form.format(x)
    signed = lambda x: re.sub(r"^[+-](0\.0)$", r"\1", f"{100 * x:+.1f}").replace("-", minus)

    def spread(entry):
        if not entry or entry["mean"] is None:
            return none
        percent = f"{100 * entry['mean']:.1f}"
        return f"{percent} {plus_minus} {100 * entry['std']:.1f}" if len(entry["values"]) > 1 else percent

    def difference(entry):
        if not entry or entry["mean"] is None:
            return none
        interval = "" if entry["low"] is None else f" [{signed(entry['low'])}, {signed(entry['high'])}]"
        return signed(entry["mean"]) + interval.replace("+", "")

    mean = lambda entry: number(100 * entry["mean"] if entry and entry["mean"] is not None else None, "{:.1f}")
    seconds = lambda x: none if x is None else f"{x:.1f}" if x < 100 else f"{x:.0f}"
    best = "best_epoch_accuracy" if headline(results) == "accuracy" else "best_epoch_balanced_accuracy"
    forms = {"accuracy": spread, "balanced_accuracy": spread, "macro_f1": mean, best: spread, "top5": mean, "ece": mean}
    forms |= dict.fromkeys((*GROUPS, "memorised"), mean)
    forms |= dict.fromkeys(("cost_ratio", "gradient_evaluations", "inner_evaluations"), lambda x: number(x, "{:.2f}"))
    forms["seconds"] = seconds
    cells = {key: [form(m.get(key)) for m in results["methods"].values()] for key, form in forms.items()}
    cells["difference"] = [difference(difference_of(results, name)) for name in results["methods"]]
    cells["best_epoch"] = cells.pop(best)
    for key in attack_titles(results):
        cells[key] = [spread((m.get("attacks") or {}).get(key.removeprefix(ATTACK))) for m in results["methods"].values()]
    # A group whose classes are not tested shows that it has no number; one that doesn't exist (balanced data) is None.
    there = {key for key in GROUPS if any(m.get(key) for m in results["methods"].values())}
    return {key: column for key, column in cells.items() if key in there or any(cell != none for cell in column)}


def attack_titles(results: dict) -> dict[str, str]:
    """{column of an attack: its short name}, numbered where an attack occurs with several settings."""
    typed = dict.fromkeys(name for m in results["methods"].values() for name in m.get("attacks") or {})
    short = [re.split(r"[^\w-]", name)[0].replace("universal", "univ.").replace("class_", "cl.") for name in typed]
    number = lambda i: f" {short[: i + 1].count(short[i])}" if short.count(short[i]) > 1 else ""
    return {ATTACK + name: short[i] + number(i) for i, name in enumerate(typed)}


def num_seeds(results: dict) -> int:
    """The most seeds that any method was run with."""
    return max((len(m["accuracy"]["values"]) for m in results["methods"].values() if m.get("accuracy")), default=0)


# Files and plain values -----------------------------------------------------------------------------------------------


def _checked(function, results):
    if not isinstance(results, dict) or not results.get("methods"):
        got = f"the keys {sorted(results)}" if isinstance(results, dict) else type(results).__name__
        raise ValueError(
            f"{function} needs results with at least one entry in 'methods', got {got}. "
            "Write load_results('results.json') to read what compare.py wrote."
        )
    return _plain(results)


def _plain(value):
    """value as strict JSON has it: arrays as lists, numpy scalars as numbers, nan and infinity as None, keys text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write(text, path):
    """Writes to a file beside it first, then puts that in its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path
