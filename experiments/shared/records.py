"""What scripts report: one method's runs as a record, attacks on the finished nets, results.json."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.shared.folders import images_hash
from experiments.shared.tested import notes_of
from perturbjax.analysis import (
    Groups,
    evaluate,
    groups_by_frequency,
    is_balanced,
    load_results,
    mean_by_class,
    relative_loss_variation,
    summary,
)
from perturbjax.analysis.attack import PGD, AttackData, Universal, parse_attacks
from perturbjax.analysis.metrics import add_confusions
from perturbjax.data import Dataset
from perturbjax.loss.teacher import load_teacher
from perturbjax.training import History
from perturbjax.training.checkpoint import dump_json


def record(histories: Sequence[History], datasets: Sequence[Dataset]) -> dict:
    """The results of one method over its seeds, in results.json's form; cost_ratio and difference are left open."""
    runs = [evaluate(h.logits, d.test_labels, d.class_counts) for h, d in zip(histories, datasets, strict=True)]
    over = lambda key: None if runs[0][key] is None else summary([run[key] for run in runs])
    by_class = lambda key: mean_by_class([run[key] for run in runs])
    variations = [
        relative_loss_variation(*h.losses, d.num_classes)
        for h, d in zip(histories, datasets, strict=True)
        if h.losses is not None
    ]
    tested = sorted(set.intersection(*(set(h.tested) for h in histories)))  # runs may have been told apart when to test
    balanced = [curve(h, "balanced_accuracy", h.tested) for h in histories]
    curves = {name: [curve(h, name, tested) for h in histories] for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    known = {name: rows for name, rows in curves.items() if all(None not in row for row in rows)}
    return {
        "accuracy": over("accuracy"),
        "balanced_accuracy": over("balanced_accuracy"),
        "macro_f1": over("macro_f1"),
        "best_epoch_accuracy": summary([max(h.accuracy) for h in histories]),
        "best_epoch_balanced_accuracy": None if any(None in row for row in balanced) else summary(list(map(max, balanced))),
        "top5": over("top5"),
        "ece": over("ece"),
        **{name: over_seeds_with(name, runs, datasets) for name in Groups._fields},
        "memorised": None if histories[0].memorised is None else summary([h.memorised for h in histories]),
        "per_class": by_class("per_class"),
        "precision": by_class("precision"),
        "f1": by_class("f1"),
        # Over all seeds, whose test sets may be the same.
        "support": np.sum([run["support"] for run in runs], axis=0).tolist(),
        "confusion": add_confusions([run["confusion"] for run in runs]),
        "cost_ratio": None,
        "gradient_evaluations": float(np.mean([h.gradient_evaluations for h in histories])),
        "inner_evaluations": float(np.mean([h.inner_evaluations for h in histories])),
        "seconds": float(np.sum([h.seconds for h in histories])),
        "examples_per_second": float(np.mean([h.examples_per_second for h in histories])),
        "learning_curve": {"epoch": tested, **known},
        "relative_loss_variation": mean_by_class(variations) if variations else None,
        "difference": None,
        "balanced_difference": None,
        "metrics": histories[-1].metrics,
    }


def curve(history: History, name: str, epochs: Sequence[int]) -> list[float | None]:
    """One of the history's curves at these epochs; None where it is not known: a version without it may have begun the run."""
    known = dict(zip(history.tested, getattr(history, name), strict=False))
    return [known.get(epoch) for epoch in epochs]


def over_seeds_with(group: str, runs: Sequence[dict], datasets: Sequence[Dataset]) -> dict | None:
    """Mean and spread of a group's accuracy over the seeds whose test set has samples of the group; None if it has no classes.

    `notes_on_test_sets` says which group has no samples.
    """
    groups = [groups_by_frequency(d.class_counts) for d in datasets]
    if all(found is None or not getattr(found, group).size for found in groups):
        return None
    values = [run[group] for run in runs]
    known = [value for value in values if value is not None]
    return summary(known or values) | {"values": values}


def attacks_of(settings: Any, dataset: Dataset) -> dict[str, PGD | Universal]:
    """The attacks that --attack names, checked before anything is trained."""
    found = parse_attacks(settings.attack)
    if found and dataset.tokenizer is not None:
        raise ValueError("--attack needs images, got texts. Leave it out.")
    if found and jax.process_count() > 1:
        raise ValueError(
            "--attack needs one process, got several. Give the same command without --coordinator once the training is finished."
        )
    return found


def attacked_before(results: dict, attacks: Mapping[str, Any]) -> bool:
    """Whether the results hold all these attacks on every method."""
    return all(set(attacks) <= set(entry.get("attacks") or {}) for entry in results["methods"].values())


def attacked(
    attacks: Mapping[str, PGD | Universal], runs: Sequence[tuple[pathlib.Path, Dataset, int]], console: Console
) -> dict[str, dict]:
    """{attack as typed: mean, std, values} of one method's finished runs, (folder, data, seed).

    Each number is kept in its run's attack.json, by the attack's settings and the data, and not computed again.
    """
    found: dict[str, list[float]] = {typed: [] for typed in attacks}
    for folder, dataset, seed in runs:
        file = folder / "attack.json"
        kept, net = read_json(file), None
        for typed, attack in attacks.items():
            key = f"{attack!r} seed={seed} data={attacked_data(dataset)}"
            if key not in kept:
                with console.status(f"attacking {folder.parent.name}/{folder.name}: {typed}"):
                    net = net or load_teacher(folder)
                    data = AttackData(
                        dataset.train_images,
                        dataset.train_labels,
                        dataset.test_images,
                        dataset.test_labels,
                        dataset.num_classes,
                    )
                    kept[key] = attack.accuracy(net, data, seed)
                dump_json(file, kept)
            found[typed].append(kept[key])
    return {typed: summary(values) for typed, values in found.items()}


def attacked_data(dataset: Dataset) -> str:
    """Training and test set, as hashes."""
    labels = hashlib.sha256(dataset.train_labels.tobytes() + dataset.test_labels.tobytes()).hexdigest()[:12]
    return "-".join((images_hash(dataset.train_images), images_hash(dataset.test_images), labels))


def read_json(file: pathlib.Path) -> dict:
    """What the file holds; {} if it is missing or damaged, since it can be made again."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def results_of(
    settings: Any, datasets: Sequence[Dataset], seeds: Sequence[int], histories: Mapping[str, Sequence[History]]
) -> dict:
    """The whole of results.json. histories: those of each method, one for each seed."""
    first = datasets[0]
    counts = [np.bincount(d.test_labels, minlength=d.num_classes) for d in datasets]
    return {
        "command": command_line(),
        "versions": versions(),
        "data": {
            "name": first.name,
            "train_size": len(first.train_labels),
            "test_size": len(first.test_labels),
            "class_counts": [int(n) for n in first.class_counts],
            "test_counts": [int(n) for n in counts[0]],
            "test_balanced": all(map(is_balanced, counts)),
            "class_names": list(first.class_names),
            "subset_hash": [d.subset_hash for d in datasets],
            "views": list(first.views),
            "notes": notes_of(datasets),
            "image_shape": list(first.image_shape),
        },
        "settings": dataclasses.asdict(settings) | {"seeds": list(seeds)},
        # Of the whole process, whichever method it came from: a device doesn't tell the peak of a part.
        "peak_memory_bytes": max(h.peak_memory for found in histories.values() for h in found),
        "methods": {typed: record(found, datasets) for typed, found in histories.items()},
    }


def command_line() -> str:
    """The command that made a result, without this machine's paths."""
    script = pathlib.Path(sys.argv[0])
    shown = f"experiments/{script.name}" if script.suffix == ".py" else script.name
    return f"python {shown} {shlex.join(sys.argv[1:])}".strip()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("perturbjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout on the path
            found[name] = "not installed"
    return found


def read_results(file: pathlib.Path) -> dict | None:
    """results.json; None if it is missing or damaged, since it can be made again from the runs."""
    try:
        return load_results(file)
    except (OSError, ValueError):
        return None


def finished_before(results: dict, file: pathlib.Path) -> str:
    """What to say of results that were there already: where they lie, and how to get what the version that wrote them did not have."""
    said = f"Finished before, in {file.parent}."
    if all("balanced_accuracy" in entry for entry in results["methods"].values()):
        return said
    return (
        f"{said} An earlier version wrote the results: for balanced accuracy, macro F1, precision and confusion matrices delete {file} and "
        "give the same command again; nothing is trained anew."
    )
