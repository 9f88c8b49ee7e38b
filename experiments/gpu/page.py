"""gpu.md: the report as a page."""

from collections.abc import Callable, Iterable
from typing import Any

from experiments import bench
from experiments.gpu.sizes import TOLERANCE
from perturbjax.analysis import paired_difference

TARGET = 60.0  # seconds a run of the long tail may take, its seeds side by side


def troubles(report: dict) -> Iterable[str]:
    """What is wrong, as far as the report knows."""
    for part in PAGES:
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
    body = [part(report[name]) for name, part in PAGES.items() if report.get(name)]
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


PAGES: dict[str, Callable[[dict], str]] = {
    "numbers": numbers_page,
    "bench": bench_page,
    "vmap": vmap_page,
    "longtail": longtail_page,
    "others": others_page,
}
