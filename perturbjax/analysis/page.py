"""The page that `write_report` writes: results -> one HTML document with everything in it, readable without us.

Whatever comes from the user (names of methods, data and classes, settings, the command) is escaped where it is set.
"""

import re
from html import escape

import numpy as np

from perturbjax.analysis import plots
from perturbjax.analysis.confusion import CELLS, IN_NUMBERS, MOST, confusion_plot, most_confused, with_confusion
from perturbjax.analysis.ranking import difference_of, headline, num_untested, ordered
from perturbjax.analysis.report import ATTACK, attack_titles, num_seeds, text_cells


def page(results: dict) -> str:
    """The document: outcome in three sentences, what was trained, the table, the figures, each with how to read it."""
    title = escape(f"Which perturbation helps on {results['data']['name']}?")
    versions = ", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items())
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>",
        f'<p class="lead">{_finding(results)}</p>',
        "\n".join(f'<p class="note">Note: {escape(note)}</p>' for note in results["data"].get("notes") or ()),
        f"<h2>What was trained</h2>\n{_facts(results)}",
        f"<h2>The numbers</h2>\n{_table(results)}\n{_reading(results)}",
        *_figures(results),
        _confusions(results),
        _every_class(results),
        "<footer>Made by perturbjax from results.json, which holds these numbers in full. "
        f"Versions: {escape(versions) or 'unknown'}.</footer>\n</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _finding(results):
    """The outcome in two or three sentences that claim no more than the intervals do."""
    methods, seeds = results["methods"], num_seeds(results)
    first, cells = next(iter(methods)), text_cells(results)
    code = lambda names: ", ".join(f"<b>{escape(name)}</b>" for name in names)
    key = headline(results)
    scored = {name: m[key]["mean"] for name, m in methods.items() if m.get(key)}
    scored = {name: mean for name, mean in scored.items() if mean is not None}
    if not scored:
        return "No method has a test accuracy: every run failed or diverged."
    text = {name: cells[key][i] + " %" for i, name in enumerate(methods)}
    best = max(scored, key=scored.get)
    out = "Highest test accuracy" if key == "accuracy" else "Highest balanced accuracy (the test set is not balanced)"
    out += f" at the last epoch: {code([best])} with {text[best]}"
    if best != first:
        out += f"; the reference {code([first])} has {text[first] if first in scored else 'none'}"
    elif len(methods) > 1:
        out += ", the reference itself"
    out += f" ({'mean ± standard deviation over ' + str(seeds) + ' seeds' if seeds > 1 else 'one seed'}). "
    differences = {name: difference_of(results, name) for name in methods if name != first}
    sure = {name: d for name, d in differences.items() if d and d["low"] is not None}
    if sure:
        better, worse = [n for n, d in sure.items() if d["low"] > 0], [n for n, d in sure.items() if d["high"] < 0]
        rest = [n for n in sure if n not in better + worse]
        verdicts = {
            f"better than {code([first])}": better,
            f"worse than {code([first])}": worse,
            f"not told apart from {code([first])} by these runs": rest,
        }
        parts = "; ".join(f"{verdict}: {code(names)}" for verdict, names in verdicts.items() if names)
        out += f"Seed by seed, with 95 % intervals: {parts}. "
    elif len(methods) > 1 and seeds == 1:
        out += "With one seed no interval can be given: differences of a few points may be chance. Run more seeds. "
    tails = {n: m["tail"]["mean"] for n, m in methods.items() if m.get("tail") and m["tail"]["mean"] is not None}
    if tails and len(tails) > 1:
        rare = max(tails, key=tails.get)
        out += f"On the rarest 30 % of the classes: {code([rare])} with {100 * tails[rare]:.1f} %"
        out += f", {code([first])} with {100 * tails[first]:.1f} %." if rare != first and first in tails else "."
    return out


def _facts(results):
    """Data, model and settings as a list of terms, and the command."""
    data, settings, counts = results["data"], results["settings"], np.asarray(results["data"]["class_counts"])
    names = [str(name) for name in data["class_names"]]
    order = np.argsort(-counts, kind="stable")
    balanced = bool(np.all(counts == counts[0]))
    if balanced:
        classes = f"{len(counts)}, {counts[0]} training samples each"
    elif len(counts) <= 20:
        classes = f"{len(counts)}, with training samples " + ", ".join(f"{names[c]}: {counts[c]}" for c in order)
    else:
        classes = f"{len(counts)}, from {counts.max()} training samples ({names[order[0]]}) "
        classes += f"down to {counts.min()} ({names[order[-1]]})"
    size = " × ".join(map(str, data.get("image_shape") or ()))
    facts = {
        "data": f"{data['name']}: {data['train_size']} training and {data['test_size']} test samples"
        + f" of {size}" * bool(size),
        "view": ", then ".join(data.get("views") or ()) or "the data as it is",
        "classes": classes,
        "test samples": _test_counts(data, names),
        **{key.replace("_", " "): _text(value) for key, value in settings.items() if key != "data"},
        "training subset": _hashes(data.get("subset_hash"), settings.get("seeds")),
    }
    terms = "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    command = f"<p>The command that made this page:</p>\n<pre><code>{escape(results['command'])}</code></pre>"
    return f"<dl>\n{terms}\n</dl>\n{command}"


def _test_counts(data, names):
    """How many test samples the classes have; nothing where the results don't tell."""
    counts = np.asarray(data.get("test_counts") or ())
    if not counts.size:
        return ""
    there = np.flatnonzero(counts)
    low, high = there[counts[there].argmin()], counts.argmax()
    lack = len(counts) - len(there)
    missing = f"; {lack} {'class' if lack == 1 else 'classes'} without any" * (lack > 0)
    if counts[low] == counts[high]:
        return f"{counts[high]} of each class{missing}"
    verdict = "balanced" if data.get("test_balanced") else "not balanced"
    return f"{verdict}: from {counts[high]} ({names[high]}) down to {counts[low]} ({names[low]}){missing}"


def _hashes(hashes, seeds):
    """Which samples were drawn: one hash if every seed had the same."""
    if not hashes:
        return ""
    if len(set(hashes)) == 1:
        return f"hash {hashes[0]}" + ", the same for every seed" * (len(hashes) > 1)
    seeds = seeds if seeds and len(seeds) == len(hashes) else range(len(hashes))
    return "drawn anew for each seed; hash " + ", ".join(f"{h} (seed {s})" for s, h in zip(seeds, hashes, strict=True))


COLUMNS = {
    "accuracy": ("accuracy", "%, last epoch"),
    "balanced_accuracy": ("balanced", "accuracy, %"),
    "macro_f1": ("macro F1", "%"),
    "difference": ("difference", "points [95 % CI]"),
    "best_epoch": ("best epoch", "%"),
    "top5": ("top 5", "%"),
    "ece": ("ECE", "%"),
    "head": ("head", "%"),
    "medium": ("medium", "%"),
    "tail": ("tail", "%"),
    "memorised": ("memorised", "% of wrong labels"),
    "cost_ratio": ("cost", "× plain"),
    "gradient_evaluations": ("gradients", "a step"),
    "seconds": ("time", "s"),
}
COSTS = ("cost_ratio", "gradient_evaluations", "seconds")


def _titles(results):
    """COLUMNS, with those of the attacks before the costs."""
    attacks = {key: (escape(short), "%, attacked") for key, short in attack_titles(results).items()}
    first = {key: title for key, title in COLUMNS.items() if key not in COSTS}
    first = {key: first[key] for key in (headline(results), *first)}  # comes before the others
    return first | attacks | {key: COLUMNS[key] for key in COSTS}


def _table(results):
    cells, methods, titles = text_cells(results), results["methods"], _titles(results)
    shown = [key for key in titles if key in cells]
    head = "".join('<th scope="col">{}<small>{}</small></th>'.format(*titles[key]) for key in shown)
    rows = []
    for name in ordered(results):
        i, m = list(methods).index(name), methods[name]
        breakable = re.sub(r"([(=_])", r"\1<wbr>", escape(name))
        row = f'<th scope="row"><div>{plots.swatch(i)}<span>{breakable}</span></div></th>'
        for key in shown:
            text, d = cells[key][i], difference_of(results, name)
            if key == "difference" and i == 0:
                text = "reference"
            elif key == "difference" and d and d["low"] is not None:
                mean, interval = text.split(" ", 1)
                strong = not d["low"] <= 0 <= d["high"]
                text = f"{'<b>' * strong}{mean}{'</b>' * strong}<small>{interval}</small>"
            elif key == "gradient_evaluations" and m.get("inner_evaluations"):
                text += f"<small>+ {cells['inner_evaluations'][i]} inner</small>"
            row += f"<td>{text}</td>"
        rows.append(row)
    return _scroll(f'<th scope="col">method</th>{head}', rows)


def _reading(results):
    """How to read the columns that the table has."""
    cells, seeds, first = text_cells(results), num_seeds(results), escape(next(iter(results["methods"])))
    key, untested = headline(results), num_untested(results)
    judged = key.replace("_", " ")
    over = f" over the {len(results['data']['class_counts']) - untested} classes that have test samples" if untested else ""
    notes = {
        "accuracy": f"Test samples classified correctly after the last epoch, fixed beforehand{': the honest column' * (key == 'accuracy')}. "
        + ("Mean ± sample standard deviation over the seeds." if seeds > 1 else "One seed, so there is no spread."),
        "balanced_accuracy": f"Mean of the classes' accuracies{over}: each class counts the same, however many test samples it has. "
        + ("It orders the table, since the test set is not balanced." if key != "accuracy" else ""),
        "macro_f1": f"Mean of the classes' F1{over}: the harmonic mean of how many of a class's samples are found (recall) and how much of "
        "what is predicted as the class is of it (precision).",
        "difference": f"{judged.capitalize()} minus that of {first} under the same seed, in percentage points, mean over the seeds. "
        + (
            f"The bracket is the 95 % confidence interval (t) over the {seeds} paired seeds; if it leaves out "
            "zero, the difference is in bold. It covers the luck of the seed, not that of the test set, and is not "
            "corrected for the number of methods: of twenty methods without any effect, about one gets a bold number."
            if seeds > 1
            else "With a single seed there is no interval."
        ),
        "best_epoch": f"The highest {judged} on the test set of any epoch that was tested. Papers often print it, but it chooses the "
        "epoch by the test set and is therefore too high; the column to believe is the last epoch's.",
        "top5": "Share of test samples whose class is among the five highest outputs.",
        "ece": "Expected calibration error, 15 bins: how far confidence and accuracy lie apart. Lower is better.",
        "head": "Mean accuracy of the 30 % of the classes most frequent in the training data (head), of the middle "
        "40 % (medium) and of the rarest 30 % (tail).",
        "memorised": "Share of the training samples with a known wrong label that the trained net predicts as that label. Lower is better.",
        **{
            key: f"Test samples classified correctly both as they are and under the attack {escape(key.removeprefix(ATTACK))}."
            for key in attack_titles(results)
        },
        "cost_ratio": "Cost of training as a multiple of plain training.",
        "gradient_evaluations": "Gradient evaluations of the whole network in a training step; <em>inner</em>: those "
        "of only the part after the perturbed site.",
        "seconds": "Wall-clock time of training.",
    }
    names = {"head": "head, medium, tail"}
    titles = _titles(results)
    items = "".join(f"<dt>{names.get(k, titles[k][0])}</dt><dd>{notes[k]}</dd>\n" for k in {key: 0} | notes if k in cells)
    return f'<dl class="notes">\n{items}</dl>'


def _figures(results):
    """The figures there are numbers for: each drawn twice, for a wide and for a narrow screen (and CSS shows one)."""
    methods, counts, seeds = results["methods"], np.asarray(results["data"]["class_counts"]), num_seeds(results)
    first = escape(next(iter(methods)))
    having = lambda *keys: [name for name, m in methods.items() if all(m.get(key) for key in keys)]
    key = headline(results)
    scored = [name for name in having(key) if methods[name][key]["mean"] is not None]
    judged, curves = key.replace("_", " "), plots.learning_curves(results)
    bins = plots.class_bins(counts)
    single, balanced = len(bins) == len(counts), bool(np.all(counts == counts[0]))
    points = (
        "Each point is a class"
        if single
        else f"Each point is the mean of about {len(counts) / len(bins):.0f} neighbouring classes"
    )
    order = "Left the classes with most training samples (head), right those with fewest (tail). "
    grey = f"; grey bars: training samples of a class, from {counts.max()} down to {counts.min()}"
    order, grey = ("", f"; all have {counts[0]} training samples") if balanced else (order, grey)
    lift = "" if balanced else " A method for rare classes lifts the right end; see what it costs on the left."
    beside = f" Each panel shows one method beside {first} (black)."
    figures = [
        (
            judged.capitalize(), plots.accuracy_plot, scored, 1, True,
            "Marker: mean over the seeds; bar: one standard deviation to either side; small dots: the single seeds; "
            f"dashed line: {first}. Further right is better."
            if seeds > 1 else f"The {judged} of the single seed; dashed line: {first}. Further right is better.",
        ),
        (
            f"{judged.capitalize()} against cost", plots.cost_plot, [n for n in having("cost_ratio") if n in scored], 2, True,
            "Higher is better, further left is cheaper: a method is worth its cost if none further left is as high.",
        ),
        (
            "Accuracy by class", plots.class_plot, having("per_class"), 1, False,
            f"{order}{points}{', mean over the seeds' if seeds > 1 else ''}{grey}.{lift}",
        ),
        (
            "Learning curves", plots.curve_plot, list(curves), 1, False,
            f"Test {plots.curve_key(results).replace('_', ' ')} by epoch"
            f"{', mean over the seeds, the band one standard deviation' if seeds > 1 else ''}. "
            "Look for curves that fall towards the end (overfitting) or still rise (too few epochs).",
        ),
        (
            "Loss variation by class", plots.variation_plot, having("relative_loss_variation"), 1, False,
            "By how much the perturbation changes the training loss of a class: (l′ − l) / l, with the class means l "
            "without and l′ with it (Figure 1 of the LPL paper). Above zero a class is trained harder, below relieved. "
            f"{order}{points}{grey}.",
        ),
    ]  # fmt: skip
    for title, draw, names, needed, together, caption in figures:
        if len(names) < needed:
            continue
        split = len(names) > plots.OVERLAY and not together
        legend = "" if split or draw is plots.accuracy_plot else _key(methods, names)
        caption += beside if split and draw is not plots.variation_plot and escape(names[0]) == first else ""
        wide, narrow = draw(results, 8.4), draw(results, 3.7)  # inches
        yield (
            f"<h2>{title}</h2>\n<figure>\n<figcaption>{caption}</figcaption>\n{legend}\n"
            f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>\n</figure>'
        )


def _key(methods, names):
    items = "".join(f"<li>{plots.swatch(i)}{escape(name)}</li>" for i, name in enumerate(methods) if name in names)
    return f'<ul class="key">{items}</ul>'


def _confusions(results):
    """The confusion matrices as pictures, and the pairs that are confused most."""
    methods, seeds, names = results["methods"], num_seeds(results), with_confusion(results)
    if not names:
        return ""
    classes = [str(name) for name in results["data"]["class_names"]]
    caption = (
        "Each row is a true class, each column a predicted one, frequent classes first; the colour is the share of the row"
    )
    caption += " (numbers in %)" * (len(classes) <= IN_NUMBERS)
    caption += f". Each cell is a group of about {len(classes) / CELLS:.0f} neighbouring classes" * (len(classes) > CELLS)
    caption += (
        f". The {seeds} seeds together" * (seeds > 1) + ". The diagonal is right; a dark column takes other classes' samples."
    )
    caption += f" Of the first {MOST} of {len(names)} methods; results.json has all." * (len(names) > MOST)
    caption += " Grey rows have no test sample." * (num_untested(results) > 0)
    rows = [
        f'<th scope="row"><div>{escape(name)}</div></th><td>{escape(classes[pair.true])}</td><td>{escape(classes[pair.predicted])}</td>'
        f"<td>{100 * pair.share:.1f}</td><td>{pair.count}</td>"
        for name in names
        for pair in most_confused(methods[name])
    ]
    heads = "".join(
        f'<th scope="col">{title}</th>' for title in ("method", "true class", "predicted as", "% of the class", "samples")
    )
    pairs = _scroll(heads, rows)
    return (
        f"<h2>Confusion matrices</h2>\n<figure>\n<figcaption>{caption}</figcaption>\n"
        f'<div class="wide">{confusion_plot(results, 8.4)}</div>\n<div class="narrow">{confusion_plot(results, 3.7)}</div>\n</figure>\n'
        f"<details><summary>Most confused pairs of classes</summary>\n{pairs}\n</details>"
    )


BY_CLASS = {"per_class": "Accuracy (recall)", "precision": "Precision", "f1": "F1"}


def _every_class(results):
    """The numbers of each class, folded away, most frequent class first; results.json has more than 200."""
    data, counts = results["data"], np.asarray(results["data"]["class_counts"])
    if len(counts) > 200:
        return ""
    tested = data.get("test_counts")
    percent = lambda x: "–" if x is None else f"{100 * x:.1f}"
    parts = []
    for key, title in BY_CLASS.items():
        methods = {name: results["methods"][name][key] for name in ordered(results) if results["methods"][name].get(key)}
        if not methods:
            continue
        samples = ["samples"] if tested is None else ["training samples", "test samples"]
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("class", *samples, *methods))
        rows = [
            f'<th scope="row"><div>{escape(str(data["class_names"][c]))}</div></th><td>{counts[c]}</td>'
            + (f"<td>{tested[c]}</td>" if tested is not None else "")
            + "".join(f"<td>{percent(values[c])}</td>" for values in methods.values())
            for c in np.argsort(-counts, kind="stable")
        ]
        parts.append(f"<p>{title} in %</p>\n{_scroll(head, rows)}")
    if not parts:
        return ""
    return "<details><summary>Every class in numbers</summary>\n" + "\n".join(parts) + "\n</details>"


def _scroll(head, rows):
    """A table that scrolls sideways by itself where the screen is narrow."""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _text(value):
    """A setting as one would write it down."""
    if isinstance(value, dict):
        return ", ".join(f"{k} = {_text(v)}" for k, v in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d1d1f; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
p, figcaption, dl { max-width: 46rem; }
.note { border-left: 3px solid #d0d0d6; padding-left: .75rem; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0 0 1rem; }
dt { color: #5a5a60; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f5f5f7; border-radius: 6px; padding: .8rem 1rem; font-size: .875rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e8; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid #1d1d1f; font-weight: 600; line-height: 1.25; }
th small, td small { display: block; color: #5a5a60; font-weight: 400; font-size: .8em; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
tbody th { font-weight: 400; }
tbody th div { display: flex; align-items: center; width: max-content; max-width: 12rem; }
tbody th div { white-space: normal; overflow-wrap: anywhere; }
.swatch { margin-right: .5rem; vertical-align: middle; flex: none; }
.notes { font-size: .875rem; }
figure { margin: 0; }
figcaption { margin: 0 0 .75rem; }
figure div svg { display: block; max-width: 100%; height: auto; }
.key { list-style: none; margin: 0 0 .5rem; padding: 0; font-size: .875rem; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; }
.key li { overflow-wrap: anywhere; display: flex; align-items: center; }
.narrow { display: none; }
details { margin-top: 2.75rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .75rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid #e4e4e8; color: #5a5a60; font-size: .8rem; }
@media (max-width: 44rem) {
  main { padding: 1.5rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  tbody th div { max-width: 8rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .narrow svg { width: 100%; max-width: 30rem; }
}
@media print {
  @page { margin: 15mm; }
  main { max-width: none; padding: 0; }
  body { font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  .wide { display: block; }
  .narrow { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .25rem .3rem; }
  tbody th div { max-width: 8rem; }
}
"""
