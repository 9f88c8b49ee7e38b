"""The figures of report.html: results -> one SVG each, as text to be set into a page.

Drawn by matplotlib without pyplot or a display; text stays text; nothing depends on time or chance, so that the same
results give the same bytes. A method has the same colour, marker and line in every figure; the first one, the
reference, is black. The colours are Okabe and Ito's ("Color Universal Design", 2008), made for every kind of colour
blindness, without the yellow. `width` is in inches: every figure is drawn for a wide and for a narrow screen.
"""

import io
import re
import textwrap
import warnings
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from perturbjax.analysis.ranking import headline, ordered

COLORS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, DASHES = "osD^vPXphd<>", ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
OVERLAY = 4  # up to so many methods share one pair of axes; more get a panel each, with the reference in all of them
FONT, CHARACTER, BOTTOM = 8.5, 0.076, 0.46  # points; inches: width of a (wide) character, room for ticks and label
LOOK = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": FONT},
    **{f"{axis}.{part}": "#444444" for axis in ("xtick", "ytick") for part in ("color", "labelcolor")},
    **{"axes.edgecolor": "#999999", "axes.labelcolor": "#222222", "axes.linewidth": 0.8, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "xtick.major.width": 0.8, "ytick.major.width": 0.8},
}


class Style(NamedTuple):
    """How a method is drawn."""

    color: str
    marker: str
    dashes: Any  # a matplotlib line style


def style(index: int) -> Style:
    """How the method at this position of the results is drawn, everywhere; black is the first one's alone."""
    turn, color = divmod(max(index - 1, 0), len(COLORS) - 1)
    return Style(COLORS[min(index, 1 + color)], MARKERS[index % len(MARKERS)], DASHES[turn % len(DASHES)])


def swatch(index: int) -> str:
    """A little SVG of a method's line and marker, for keys and tables."""
    color, marker, dashes = style(index)
    shape = MarkerStyle(marker)
    points = shape.get_transform().transform(shape.get_path().to_polygons()[0]) * 8 + (15, 6)
    path = " ".join(f"{x:.1f},{12 - y:.1f}" for x, y in points)
    dash = "" if dashes == "-" else f' stroke-dasharray="{" ".join(f"{1.8 * x:g}" for x in dashes[1])}"'
    return (
        f'<svg class="swatch" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">'
        f'<path d="M0 6H30" stroke="{color}" stroke-width="1.8"{dash}/><polygon points="{path}" fill="{color}"/></svg>'
    )


def shorten(text: str, width: int, lines: int = 1) -> str:
    """text in at most `lines` lines of `width` characters; the middle gives way, since long names differ at the end."""
    for room in range(min(len(text), width * lines), 0, -1):
        cut = text if room >= len(text) else text[: (room - 1) // 2] + "…" + text[len(text) - room // 2 :]
        wrapped = textwrap.wrap(cut, width)
        if len(wrapped) <= lines:
            return "\n".join(wrapped)
    return text


@mpl.rc_context(LOOK)
def accuracy_plot(results: dict, width: float) -> str:
    """Mean accuracy (or balanced accuracy: `headline`) of each method, its standard deviation, and the single seeds below."""
    key, methods = headline(results), results["methods"]
    scored = {name: methods[name][key] for name in ordered(results) if _has(methods[name].get(key))}
    above = width < 5  # inches: on a phone the name stands above its row
    row = 0.52 if above else 0.4
    labels = [shorten(name, 30, 2) for name in scored]
    left = 0.15 if above else 0.2 + CHARACTER * max(len(line) for label in labels for line in label.split("\n"))
    fig, (ax,) = blank_figure(width, row * len(scored) + 0.6, left=left)
    names, y = list(results["methods"]), np.arange(len(scored), dtype=float)
    for at, (name, entry) in zip(y, scored.items(), strict=True):
        color, marker, _ = style(names.index(name))
        values, mean = 100 * _array(entry["values"]), 100 * entry["mean"]
        if len(values) > 1:
            ax.plot(values, np.full(len(values), at + 0.26), "o", color=color, ms=3.2, mew=0, alpha=0.55, clip_on=False)
            ax.errorbar(mean, at, xerr=100 * (entry["std"] or 0), color=color, lw=1.8, capsize=3.5, capthick=1.4)
        ax.plot(mean, at, marker, color=color, ms=6.5, mec="white", mew=0.5, zorder=5)
        if above:
            box = dict(facecolor="white", edgecolor="none", pad=0.8)  # over the reference's line
            ax.text(0, at - 0.38, shorten(name, int(width * 14)), transform=ax.get_yaxis_transform(), va="center", bbox=box)
    if names[0] in scored:
        ax.axvline(100 * scored[names[0]]["mean"], color=COLORS[0], lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.set(ylim=(len(scored) - 0.45, -0.75 if above else -0.5), xlabel=f"{_label(key)} at the last epoch (%)")
    ax.set_yticks([] if above else y, [] if above else labels)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(5 if above else 8, steps=[1, 2, 5, 10]))
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#e4e4e4", lw=0.7)
    ax.margins(x=0.06)
    return svg_text(fig, f"accuracy-{width:g}", "Accuracy of each method")


@mpl.rc_context(LOOK)
def cost_plot(results: dict, width: float) -> str:
    """Accuracy (or balanced accuracy) against what a training step costs, relative to plain training."""
    fig, (ax,) = blank_figure(width, 3.1)
    costs, key = [], headline(results)
    for i, m in enumerate(results["methods"].values()):
        if _has(m.get(key)) and m.get("cost_ratio"):
            color, marker, _ = style(i)
            costs.append(m["cost_ratio"])
            mean, std = 100 * m[key]["mean"], 100 * (m[key]["std"] or 0)
            bar = std if len(m[key]["values"]) > 1 else None
            ax.errorbar(m["cost_ratio"], mean, yerr=bar, color=color, lw=1, alpha=0.6, capsize=2)
            ax.plot(m["cost_ratio"], mean, marker, color=color, ms=7.5, mec="white", mew=0.7, zorder=5)
    low, high = min(costs), max(costs)
    if high > 5 * low:
        ax.set_xscale("log")
        ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if low / 1.3 <= t <= high * 1.3]
        ax.set_xticks(ticks)
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        pad = max(0.08 * (high - low), 0.1)
        ax.set_xlim(low - pad, high + pad)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.set(xlabel="cost of training, as a multiple of plain training", ylabel=f"{_label(key)} (%)")
    ax.grid(color="#e9e9e9", lw=0.7)
    return svg_text(fig, f"cost-{width:g}", "Accuracy against cost")


@mpl.rc_context(LOOK)
def class_plot(results: dict, width: float, key: str = "per_class") -> str:
    """Per-class accuracy (key="per_class") or relative loss variation; classes by training count, largest first."""
    counts = np.asarray(results["data"]["class_counts"])
    bins = class_bins(counts)
    ranks = np.argsort(np.argsort(-counts, kind="stable")) + 1
    x = np.array([ranks[b].mean() for b in bins])
    rows = {name: _array(m[key]) for name, m in results["methods"].items() if m.get(key)}
    curves = {name: 100 * _array([_mean(row[b]) for b in bins]) for name, row in rows.items()}
    share, balanced = key == "per_class", np.all(counts == counts[0])
    every = np.abs(np.concatenate([c[np.isfinite(c)] for c in curves.values()] or [[]]))
    heavy = bool(not share and every.size and every.max() > 500)  # percent
    names = [shorten(str(results["data"]["class_names"][b[0]]), 12) for b in bins]
    longest, room = CHARACTER * max(map(len, names)), (width - 0.8) / _grid(results, curves, width, share)[1]  # inches
    named, flat = len(bins) == len(counts) <= 20 and room / len(bins) > 0.12, longest < room / len(bins)
    bottom = BOTTOM + (longest - 0.1) * (named and not flat)
    panels, fig = _panels(results, curves, width, 2.5 + bottom, share, left=0.6 if share else 0.7, bottom=bottom)
    sizes, step = [counts[b].mean() / counts.max() for b in bins], np.diff(x).min(initial=len(counts))
    for ax, shown in panels:
        ax.use_sticky_edges = False
        if not balanced:
            ax.bar(x, sizes, step * 0.86, color="#ececec", transform=ax.get_xaxis_transform())  # 1 is the full height
        if not share:
            ax.axhline(0, color=COLORS[0], lw=0.8)
        for name in shown:
            color, marker, dashes = style(list(results["methods"]).index(name))
            mark = dict(ms=4.5 if len(panels) == 1 else 3.5, mec="white", mew=0.4, zorder=3 + (name != shown[0]))
            ax.plot(x, curves[name], marker, ls=dashes, color=color, lw=1.4, **mark)
        ax.tick_params(axis="x", length=2, rotation=90 if named and not flat else 0)
    if named:
        ax.set_xticks(x, names)  # shared by all panels
    else:
        ax.set_xticks(np.unique(np.round(np.linspace(1, len(counts), 2 if room < 3 else 6)).astype(int)))
    if share:
        ax.set_ylim(-2, 102)
    if heavy:
        for ax, _ in panels:
            ax.set_yscale("symlog", linthresh=100)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
    under = "classes" if balanced else "classes, most frequent in training first"
    edge_labels(fig, under, "accuracy of the class (%)" if share else f"change of the loss (%{', log scale' * heavy})")
    return svg_text(fig, f"{key}-{width:g}", "Accuracy by class" if share else "Relative loss variation by class")


def variation_plot(results: dict, width: float) -> str:
    """By how much each method changes the loss of each class, (l′ − l) / l; only the methods that have it."""
    return class_plot(results, width, "relative_loss_variation")


@mpl.rc_context(LOOK)
def curve_plot(results: dict, width: float) -> str:
    """Test accuracy (`curve_key`) by epoch: mean over seeds, one standard deviation to either side as a band."""
    curves, key = learning_curves(results), curve_key(results)
    panels, fig = _panels(results, curves, width, 2.9)
    for ax, shown in panels:
        for name in shown:
            color, marker, dashes = style(list(results["methods"]).index(name))
            epoch, runs = _array(curves[name]["epoch"]), 100 * _array(curves[name][key])
            mean, spread = runs.mean(0), runs.std(0, ddof=1) if len(runs) > 1 else None
            if spread is not None:
                ax.fill_between(epoch, mean - spread, mean + spread, color=color, alpha=0.16, lw=0)
            every = dict(markevery=max(1, len(epoch) // 6), ms=4, mec="white", mew=0.4)
            ax.plot(epoch, mean, marker, ls=dashes, color=color, lw=1.4, zorder=3 + (name != shown[0]), **every)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(axis="y", color="#e9e9e9", lw=0.7)
    edge_labels(fig, "epoch", f"{_label(key)} (%)")
    return svg_text(fig, f"curves-{width:g}", "Learning curves")


def learning_curves(results: dict) -> dict[str, dict]:
    """The learning curves of the methods that were tested after several epochs."""
    curves = {name: m.get("learning_curve") for name, m in results["methods"].items()}
    return {name: curve for name, curve in curves.items() if curve and len(curve["epoch"]) > 1}


def curve_key(results: dict) -> str:
    """What the learning curves show: the headline where all have it (runs that an earlier version began don't), else accuracy."""
    key = headline(results)
    return key if all(key in curve for curve in learning_curves(results).values()) else "accuracy"


def class_bins(class_counts, limit: int = 20) -> list[np.ndarray]:
    """The classes, most frequent first, one by one, or more than `limit` in that many groups of neighbours."""
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    return np.array_split(order, min(limit, len(order)))


def _grid(results, curves, width, reference):
    """The methods that get a panel each (none of them, if all can share one), and the number of columns."""
    first = next(iter(results["methods"]))
    others = [name for name in curves if len(curves) > OVERLAY and not (reference and name == first)]
    return others, 1 if not others else 2 if width < 5 else 3 if len(others) in (5, 6, 9) else 4


def _panels(results, curves, width, height, reference=True, **margins):
    """[(axes, names drawn in it)] and the figure: all in one pair of axes, or a panel per method with the reference."""
    others, columns = _grid(results, curves, width, reference)
    if not others:
        fig, (ax,) = blank_figure(width, height, **margins)
        return [(ax, list(curves))], fig
    titles, rows = [shorten(name, int(width / columns * 12) - 4, 2) for name in others], -(-len(others) // columns)
    above = 0.11 + 0.15 * max(title.count("\n") + 1 for title in titles)
    fig, grid = blank_figure(
        width, rows * (1.35 + above) + margins.get("bottom", BOTTOM), rows, columns, above=above, **margins
    )
    for i, ax in enumerate(grid):
        ax.set_visible(i < len(others))
        ax.tick_params(labelbottom=i + columns >= len(others))
        ax.set_title(titles[i] if i < len(titles) else "", fontsize=FONT, loc="left", pad=4)
    beside = [name for name in curves if name not in others]  # the reference, if it is there
    return [(ax, [*beside, name]) for ax, name in zip(grid, others)], fig


def blank_figure(width, height, rows=1, columns=1, *, left=0.6, bottom=BOTTOM, above=0.1):
    """A figure and its axes [rows · columns], margins in inches. (An automatic layout takes three times as long.)"""
    fig, gap = Figure(figsize=(width, height)), 0.14
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    size = ((width - left - 0.15 - gap * (columns - 1)) / columns, (height - bottom - above * rows - 0.1 * (rows - 1)) / rows)
    edges = dict(left=left / width, right=1 - 0.15 / width, bottom=bottom / height, top=1 - above / height)
    fig.subplots_adjust(**edges, wspace=gap / size[0], hspace=(above + 0.1) / size[1])
    return fig, axes


def edge_labels(fig, below, beside):
    """One label for all panels, at the figure's edges."""
    width, height = fig.get_size_inches()
    fig.supxlabel(below, y=0.06 / height, fontsize=FONT)
    fig.supylabel(beside, x=0.04 / width, ha="left", fontsize=FONT)


def svg_text(fig, name, label):
    """The figure as <svg>: no prologue, no metadata, ids that are unique in the page, a label for screen readers."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the letter
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    unique = lambda tag: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])
    return re.sub(r"<[^>]*>", unique, svg).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def _array(values):
    return np.array(values, dtype=np.float64)  # None becomes nan


def _label(key):
    return "test " + key.replace("_", " ")


def _has(entry):
    return entry is not None and entry["mean"] is not None


def _mean(values):
    values = values[~np.isnan(values)]
    return values.mean() if values.size else np.nan
