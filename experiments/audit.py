"""Whose labels are probably wrong? One training, and every sample ranked by the perturbation that it needed.

    python experiments/audit.py --data mine.npz --model cnn --out DIR                 # your own data
    python experiments/audit.py --view "noise(symmetric, 0.2)" --out DIR              # known flips: how good is the ranking?
    python experiments/audit.py --data photos/ --model resnet20 --seeds 3 --out DIR   # and how much do seeds disagree?

Writes to --out: audit.csv (every training sample, the most suspicious first: given and suggested label, score, the signals behind it;
before all others those that are there twice, bit for bit, under two labels: duplicates.csv lists all copies),
sheet.html (the most suspicious ones as pictures or texts), cleaned.npz (without the flagged ones, or relabelled; test and validation
set as they are; --data reads it), and audit.json (noise rate, confusion, threshold; where the true labels are known, how well each
score finds the wrong ones, beside cleanlab's from out-of-fold predictions of the same net).

The signals are means over training (perturbjax.analysis.dynamics): so train shortly. A net that is trained long enough fits wrong labels
too, and its mean prediction with them. Interrupted, the same command goes on.
"""

import base64
import collections
import csv
import dataclasses
import html
import importlib.util
import io
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import softmax
from sklearn.model_selection import StratifiedKFold

from experiments import shared
from perturbjax.analysis import audit
from perturbjax.analysis.dynamics import dynamics, mean_dynamics, sample_signals
from perturbjax.checks import check_choice, check_number
from perturbjax.data import Dataset, find_copies, pack
from perturbjax.data.dataset import take
from perturbjax.data.duplicates import has_copies
from perturbjax.training import History, Recipe, RunFolder, TimedStep, cost_ratios, first_batch, fit, init_state, sample_data
from perturbjax.training.checkpoint import Checkpoints, dump_json
from perturbjax.training.devices import to_host
from perturbjax.training.feed import order_of


@dataclasses.dataclass(frozen=True)
class AuditSettings(shared.Settings):
    """Flags of audit.py."""

    view: str = "none"
    """What is made of the data first; noise(kind, rate) flips labels to try the audit on."""
    epochs: int = 20
    """Passes over the data of each training; more, and wrong labels are learnt too."""
    method: str = "ce"
    """What is trained, as in train.py."""
    seed: int = 0
    """Of the view and of the first training; the next ones take the numbers after it."""
    seeds: int = 1
    """Trainings whose signals are averaged; from 2 on, their disagreement is a signal too."""
    evidence: str = "memory"
    """memory: signals of the training itself; folds: of the predictions for samples left out, --folds trainings per seed."""
    folds: int = 5
    """Folds of the out-of-fold predictions: the evidence, or cleanlab's where the true labels are known (0: no cleanlab)."""
    weight: float = 0.175
    """LogPert's λ: every sample's true-class probability is to be lifted to 1 − λ."""
    top: int = 200
    """Samples on the contact sheet."""
    clean: str = "drop"
    """What cleaned.npz makes of flagged samples: drop or relabel."""
    out: str | None = None
    """Folder; runs/audit-DATA-VIEW if not given."""


@dataclasses.dataclass(frozen=True)
class Watched:
    """A method with the recorder before it; hashable, as a recipe's builder must be."""

    method: shared.Method
    weight: float

    def __call__(self, numbers: Any) -> tuple:
        return (dynamics(weight=self.weight), *self.method(numbers))


def seeds(settings: AuditSettings) -> range:
    """Of the trainings."""
    return range(settings.seed, settings.seed + settings.seeds)


@dataclasses.dataclass
class Evidence:
    """What the trainings say of every sample."""

    signals: dict[str, np.ndarray]
    probability: np.ndarray  # [N, C]
    trainings: int


def main(argv: list[str]) -> None:
    """Runs the audit."""
    settings = shared.first_flags(argv, AuditSettings, __doc__, one_process=True)
    methods = shared.parse_methods(settings.method, settings.plugin)
    check(settings, methods)
    [(typed, (method, numbers))] = methods.items()
    dataset = shared.load_view(settings, settings.seed, refuse_duplicates=False)  # they are what it is to find
    shared.check_runs(settings, dataset, methods, shared.channel_stats(settings))
    with shared.prepare_out(settings.out, "audit", settings.view, run_identity(settings, dataset)) as folder:
        console, began = Console(), time.perf_counter()
        shared.print_notes(dataset, console, settings, folder.path)
        numbers = shared.make_numbers(settings, numbers)
        recipe = shared.make_recipe(settings, dataset, method, shared.channel_stats(settings))
        compares = dataset.flipped.any() and settings.folds and importlib.util.find_spec("cleanlab") is not None
        if settings.evidence == "folds" or compares:
            check_folds(settings, dataset)
        if settings.evidence == "memory":
            check_all_seen(settings, recipe, dataset.train_labels)
            found = from_memory(settings, recipe, numbers, dataset, folder.path)
        else:
            found = from_folds(settings, recipe, numbers, dataset, folder.path)
        score = audit.combined(found.signals)
        flagged = audit.suspects(found.probability, dataset.train_labels)
        suggestion = audit.suggested(found.probability, dataset.train_labels)
        others = other_labels(dataset)
        report = summary(settings, dataset, found, score, flagged, suggestion) | {"disputed": len(others)}
        undisputed = [n not in others for n in range(len(score))]  # no score says as much as two labels of one image
        order = np.lexsort((-score, undisputed))
        write_csv(folder.path / "audit.csv", dataset, order, score, flagged, suggestion, found, others)
        page = sheet(dataset, order[: settings.top], score, flagged, suggestion, others)
        (folder.path / "sheet.html").write_text(page, encoding="utf-8")
        write_cleaned(folder.path / "cleaned.npz", dataset, flagged, suggestion, relabel=settings.clean == "relabel")
        # The rest says how good and how dear that was: an error there leaves the files.
        dump_json(folder.path / "audit.json", report)
        if settings.evidence == "memory":
            report["cost"] = {"recorder": recorder_cost(settings, recipe, numbers, dataset)}
        if report["noise_rate"]["true"] is not None and settings.folds:
            report["baselines"]["cleanlab"] = cleanlab(settings, recipe, numbers, dataset, folder.path, console)
        report["seconds"] = time.perf_counter() - began
        dump_json(folder.path / "audit.json", report)
        show(report, folder.path, console)


def check(settings: AuditSettings, methods: dict) -> None:
    """Raises ValueError for flags that can't be."""
    if len(methods) != 1:
        raise ValueError(f"--method needs one method, got {len(methods)}. Chain with +.")
    check_choice("--evidence", "evidence", settings.evidence, ("memory", "folds"))
    check_choice("--clean", "clean", settings.clean, ("drop", "relabel"))
    check_number("--seeds", low=1, seeds=settings.seeds)
    check_number("--seed", low=0, seed=settings.seed)
    none = settings.folds == 0 and settings.evidence == "memory"  # no comparison with cleanlab
    check_number("--folds", low=2, folds=None if none else settings.folds)
    check_number("--weight", low=0, open_low=True, high=0.999, weight=settings.weight)
    check_number("--top", low=0, top=settings.top)


def check_all_seen(settings: AuditSettings, recipe: Recipe, labels: np.ndarray) -> None:
    """Raises ValueError if a training would leave samples out: an epoch drops its last, smaller batch, or has each batch several times, and
    there are few epochs."""
    for seed in seeds(settings):
        unseen = np.ones(recipe.num_examples, bool)
        for epoch in range(recipe.epochs):
            unseen[order_of(recipe, labels, seed, epoch).reshape(-1)] = False
            if not unseen.any():
                break
        else:
            raise ValueError(
                f"audit.py needs to train on every sample at least once, got --epochs {recipe.epochs} with --batch-size "
                f"{recipe.batch_size}, which leave {unseen.sum()} of {unseen.size} out. Write --epochs {recipe.epochs + recipe.replays} or "
                "more, or a smaller --batch-size."
            )


def check_folds(settings: AuditSettings, dataset: Dataset) -> None:
    """Raises ValueError if a class has fewer samples than there are folds."""
    fewest = int(dataset.class_counts.min())
    if fewest < settings.folds:
        raise ValueError(
            f"--folds needs at least that many samples of every class, got {settings.folds} folds and a class of {fewest}. "
            f"Write --folds {fewest if fewest > 1 else 0}."
        )


def run_identity(settings: AuditSettings, dataset: Dataset) -> dict:
    """What the trainings are, without the flags that say what is made of them; --folds are cleanlab's where memory is the evidence."""
    after = ("clean", "top") + (("folds",) if settings.evidence == "memory" else ())
    return {name: value for name, value in shared.identity(settings, dataset).items() if name not in after}


def from_memory(settings: AuditSettings, recipe: Recipe, numbers: dict, dataset: Dataset, out: pathlib.Path) -> Evidence:
    """The signals that --seeds trainings recorded on the way."""
    watched = dataclasses.replace(recipe, build=Watched(recipe.build, settings.weight))
    one = lambda seed: trained(settings, watched, numbers, dataset, seed, out / f"seed-{seed}")
    parts = [mean_dynamics(one(seed)[1]) for seed in seeds(settings)]
    averaged = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    found = audit.signals(averaged)
    if settings.seeds > 1:
        tops = np.stack([np.nan_to_num(part["probability"]).argmax(1) for part in parts])
        found["disagreement"] = (tops != dataset.train_labels[None]).mean(0)
    return Evidence(found, averaged["probability"], settings.seeds)


def from_folds(settings: AuditSettings, recipe: Recipe, numbers: dict, dataset: Dataset, out: pathlib.Path) -> Evidence:
    """The signals of out-of-fold predictions."""
    logits = np.stack([out_of_fold(settings, recipe, numbers, dataset, seed, out) for seed in seeds(settings)])
    parts = [jax.device_get(sample_signals(l, dataset.train_labels, settings.weight)) for l in logits]
    averaged = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    found = audit.signals(averaged)
    if settings.seeds > 1:
        found["disagreement"] = (logits.argmax(-1) != dataset.train_labels[None]).mean(0)
    return Evidence(found, averaged["probability"], settings.folds * settings.seeds)


def trained(settings, recipe: Recipe, numbers: dict, dataset: Dataset, seed: int, path: pathlib.Path) -> tuple[History, Any]:
    """(history, the first link's state) of one training in a folder of its own; a finished one is read from its last checkpoint."""
    with RunFolder(path) as folder:
        options, state = shared.options(settings, path), None
        if (history := shared.finished_run(folder)) is not None:
            like = to_host(init_state(recipe, numbers, sample_data(dataset), seed))
            with Checkpoints(folder.checkpoints) as checkpoints:
                state = found[1] if (found := checkpoints.restore(like, options.say)) is not None else None
        if history is None or state is None:
            history = fit(recipe, dataset, numbers, seed, folder=folder, options=options)
            history.save(folder.finished)
            state = history.state
        return history, state.states[0] if state.states else None


def out_of_fold(settings, recipe: Recipe, numbers: dict, dataset: Dataset, seed: int, out: pathlib.Path) -> np.ndarray:
    """[N, C] logits of every sample by a net that was trained without it."""
    labels = dataset.train_labels
    splits = list(StratifiedKFold(settings.folds, shuffle=True, random_state=seed).split(labels, labels))
    size = min(len(rest) for rest, _ in splits)  # one size for all folds: one compilation
    logits = np.zeros((len(labels), dataset.num_classes), np.float32)
    for fold, (rest, held) in enumerate(splits):
        part = take(dataset, rest[:size])
        part = dataclasses.replace(part, test_images=dataset.train_images[held], test_labels=labels[held])
        of_part = dataclasses.replace(recipe, num_examples=size)
        history, _ = trained(settings, of_part, numbers, part, seed, out / f"seed-{seed}-fold-{fold}-of-{settings.folds}")
        logits[held] = history.logits
    return logits


def summary(settings, dataset: Dataset, found: Evidence, score, flagged, suggestion) -> dict:
    """audit.json, without the baselines that need trainings of their own."""
    wrong, known = dataset.flipped, bool(dataset.flipped.any())
    counts = np.maximum(dataset.class_counts, 1)
    by_class = [
        {
            "class": name,
            "samples": int(dataset.class_counts[c]),
            "estimated": float(flagged[dataset.train_labels == c].sum() / counts[c]),
            "true": float(wrong[dataset.train_labels == c].sum() / counts[c]) if known else None,
        }
        for c, name in enumerate(dataset.class_names)
    ]
    single = {name: audit.quality(values, wrong) for name, values in found.signals.items()} if known else {}
    overall = audit.quality(score, wrong) if known else None
    return {
        "command": shared.command_line(),
        "versions": shared.versions(),
        "data": {
            "name": dataset.name,
            "train_size": len(wrong),
            "subset_hash": dataset.subset_hash,
            "views": list(dataset.views),
        },
        "settings": dataclasses.asdict(settings),
        **(overall or {"auroc": None, "average_precision": None, "precision_at_k": None, "k": None}),
        "f1_at_threshold": audit.threshold_quality(flagged, wrong) if known else None,
        "flagged": int(flagged.sum()),
        "trainings": found.trainings,
        "by_class": by_class,
        "noise_rate": {"estimated": float(flagged.mean()), "true": float(wrong.mean()) if known else None},
        "confusion": audit.confusion(dataset.train_labels, suggestion, flagged, dataset.num_classes).tolist(),
        "signals": single,
        "baselines": {"cleanlab": None, "loss": single.get("loss"), "aum": single.get("aum")},
    }


def cleanlab(settings, recipe: Recipe, numbers: dict, dataset: Dataset, out: pathlib.Path, console: Console) -> dict | None:
    """How well cleanlab's scores find the wrong labels, from out-of-fold predictions of the same net; None without cleanlab."""
    if importlib.util.find_spec("cleanlab") is None:
        console.print("cleanlab is not installed, so there is no comparison with it: pip install cleanlab")
        return None
    probability = softmax(out_of_fold(settings, recipe, numbers, dataset, settings.seed, out).astype(np.float64), axis=1)
    scores = audit.cleanlab_scores(dataset.train_labels, probability)
    each = {name: audit.quality(score, dataset.flipped) for name, score in scores.items()}
    best = lambda key: max(quality[key] for quality in each.values())
    keys = ("auroc", "average_precision", "precision_at_k")
    return {**{key: best(key) for key in keys}, "trainings": settings.folds, "methods": each}


def recorder_cost(settings, recipe: Recipe, numbers: dict, dataset: Dataset) -> float:
    """A step with the recorder over one without, in paired rounds."""
    watched = dataclasses.replace(recipe, build=Watched(recipe.build, settings.weight))
    batch = first_batch(recipe, dataset, settings.stream)
    programs = {name: TimedStep(of, numbers, dataset, batch=batch) for name, of in (("plain", recipe), ("watched", watched))}
    return cost_ratios(programs, "plain", rounds=9, steps=5)["watched"]


def other_labels(dataset: Dataset) -> dict[int, str]:
    """{training sample: the other labels under which it is there too, in any part}: not all of them are right."""
    if not has_copies(dataset):
        return {}
    copies = find_copies(dataset)
    disputed = np.flatnonzero(copies.disputed)
    under = collections.defaultdict[int, set[int]](set)
    for n in disputed:
        under[int(copies.first[n])].add(int(copies.labels[n]))
    names, last = dataset.class_names, copies.of("train").stop
    rest = lambda n: sorted(under[int(copies.first[n])] - {int(copies.labels[n])})
    return {int(n): "; ".join(names[c] for c in rest(n)) for n in disputed if n < last}


def write_csv(path: pathlib.Path, dataset: Dataset, order, score, flagged, suggestion, found: Evidence, others) -> None:
    """Every training sample, in that order; its file, the other labels of its copies and its true label, where there are any."""
    names = dataset.class_names
    columns: dict[str, Callable] = {
        "index": lambda i: int(dataset.train_index[i]),
        "given": lambda i: names[dataset.train_labels[i]],
        "suggested": lambda i: names[suggestion[i]],
        "score": lambda i: f"{score[i]:.6g}",
        "flagged": lambda i: int(flagged[i]),
    }
    columns |= {name: lambda i, values=values: f"{values[i]:.6g}" for name, values in found.signals.items()}
    if dataset.flipped.any():
        columns["true"] = lambda i: names[dataset.true_labels[i]]
    if others:
        columns["other_labels"] = lambda i: others.get(int(i), "")
    if dataset.train_names is not None:
        columns["name"] = lambda i: dataset.train_names[i]
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([of(i) for of in columns.values()] for i in order)


def write_cleaned(path: pathlib.Path, dataset: Dataset, flagged, suggestion, *, relabel: bool) -> None:
    """The training set without the flagged samples, or with the suggested labels; test and validation set, domains and names as they are."""
    kept, labels = cleaned(dataset.train_labels, flagged, suggestion, dataset.num_classes, relabel=relabel)
    arrays = {"train_labels": labels[kept], "train_index": dataset.train_index[kept], "test_labels": dataset.test_labels}
    parts = {"train": kept, "test": slice(None)}
    if dataset.validation_labels is not None:
        parts["validation"] = slice(None)
        arrays["validation_labels"] = dataset.validation_labels
    for part, rows in parts.items():
        if dataset.tokenizer is None:
            arrays[f"{part}_images"] = getattr(dataset, f"{part}_images")[rows]
        else:
            arrays |= zip((f"{part}_text", f"{part}_text_offsets"), pack(getattr(dataset, f"{part}_texts")[rows]))
        domains = getattr(dataset, f"{part}_domains", None)
        if domains is not None:
            arrays[f"{part}_domains"] = domains[rows]
    names = {"class_names": dataset.class_names} | ({"domain_names": dataset.domain_names} if dataset.domain_names else {})
    np.savez_compressed(path, **arrays, **{key: np.array(of, dtype=str) for key, of in names.items()})


def cleaned(given, flagged, suggestion, num_classes: int, *, relabel: bool) -> tuple[np.ndarray, np.ndarray]:
    """(which samples stay [N] bool, their labels [N]): without the flagged ones, or with the suggested labels.

    A class that would vanish keeps its samples as they are, flagged or not: a person has to look.
    """
    changed = flagged.copy()
    while True:  # what stays in one class may have been the last of another
        labels = np.where(changed, suggestion, given) if relabel else given
        kept = np.ones(len(given), bool) if relabel else ~changed
        gone = changed & (np.bincount(labels[kept], minlength=num_classes) == 0)[given]
        if not gone.any():
            return kept, labels
        changed &= ~gone


def sheet(dataset: Dataset, order, score, flagged, suggestion, others) -> str:
    """The contact sheet: one self-contained page."""
    names = [html.escape(name) for name in dataset.class_names]
    cards = []
    for i in order:
        truth = ""
        if dataset.flipped.any():
            truth = f"<br>true: {names[dataset.true_labels[i]]}{' ✗' if dataset.flipped[i] else ' ✓'}"
        if i in others:
            truth += f"<br>a copy is labelled: <b>{html.escape(others[i])}</b>"
        if dataset.train_names is not None:
            truth += f"<br>{html.escape(dataset.train_names[i])}"
        cards.append(
            f'<figure class="{"flagged " * int(flagged[i])}{dataset.kind}">{preview(dataset, i)}<figcaption>#{int(dataset.train_index[i])}<br>'
            f"given: <b>{names[dataset.train_labels[i]]}</b><br>suggested: <b>{names[suggestion[i]]}</b>{truth}<br>"
            f"score {score[i]:.3f}</figcaption></figure>"
        )
    copied = ", those before all others that are there under two labels" if others else ""
    title = f"{html.escape(dataset.name)}: the {len(cards)} most suspicious labels of {len(flagged)}"
    style = (
        "body{font:14px system-ui,sans-serif;margin:2rem;color:#222}main{display:flex;flex-wrap:wrap;gap:.75rem}"
        "figure{margin:0;padding:.5rem;width:9.5rem;border:1px solid #ccc;border-radius:6px}figure.flagged{border-color:#b3261e;"
        "box-shadow:inset 0 0 0 1px #b3261e}img{width:100%;image-rendering:pixelated;display:block}figcaption{font-size:12px;"
        "line-height:1.35;margin-top:.4rem;overflow-wrap:anywhere}.texts{width:22rem}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>'
        f"<h1>{title}</h1><p>The most suspicious first{copied}. Framed in red: flagged, since the mean prediction over training is another class. "
        "The number is the sample's position in its source; audit.csv has all samples and the signals behind the score.</p>"
        f"<main>{''.join(cards)}</main></body></html>\n"
    )


EXCERPT = 600  # characters of a text on the sheet


def preview(dataset: Dataset, i: int) -> str:
    """A sample as HTML."""
    if dataset.tokenizer is not None:
        text = str(dataset.train_texts[i])
        return f"<div>{html.escape(text if len(text) <= EXCERPT else text[:EXCERPT] + ' …')}</div>"
    from PIL import Image

    image = np.asarray(dataset.train_images[i])
    pixels = image if image.dtype == np.uint8 else np.rint(255 * image).astype(np.uint8)
    shown = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    stream = io.BytesIO()
    shown.save(stream, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def show(report: dict, out: pathlib.Path, console: Console) -> None:
    """The outcome on the terminal."""
    if report["disputed"]:
        console.print(
            f"{report['disputed']} training samples have a copy, the same bit for bit, under another label: not both are right. They come "
            f"first in audit.csv and sheet.html; {shared.COPIES} has all copies.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    rate, n = report["noise_rate"], report["data"]["train_size"]
    truth = "" if rate["true"] is None else f" (really {100 * rate['true']:.1f} %)"
    console.print(
        f"{report['flagged']} of {n} labels look wrong: an estimated {100 * rate['estimated']:.1f} %{truth}. "
        f"{report['trainings']} training{'s' if report['trainings'] > 1 else ''}, {report['seconds']:.0f} s.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if report["auroc"] is not None:
        shown = Table("score", "AUROC", "average precision", "precision at k", "trainings", box=None)
        for column in shown.columns[1:]:
            column.justify = "right"
        rows = [("combined", report, report["trainings"])]
        rows += [(name, quality, report["trainings"]) for name, quality in report["signals"].items()]
        best = report["baselines"]["cleanlab"]
        rows += [
            (f"cleanlab {name}", quality, best["trainings"]) for name, quality in (best or {"methods": {}})["methods"].items()
        ]
        for name, quality, trainings in rows:
            numbers = [f"{quality[key]:.3f}" for key in ("auroc", "average_precision", "precision_at_k")]
            shown.add_row(name, *numbers, str(trainings))
        console.print(shown)
        console.print(
            f"k = {report['k']}, the wrong labels; F1 of the flagged ones {report['f1_at_threshold']:.3f}", highlight=False
        )
    console.print(f"Wrote audit.csv, sheet.html, cleaned.npz and audit.json to {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    shared.start(main)
