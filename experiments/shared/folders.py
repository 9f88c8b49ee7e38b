"""The folders of runs: what a run is, where it lies, and what a finished one left."""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from experiments.shared.flags import Settings, devices_of
from perturbjax import spec, taxonomy
from perturbjax.data import Dataset
from perturbjax.training import History, OtherSettings, RunFolder
from perturbjax.training.folder import RUN, FolderInUse, compare_settings

RUNTIME = (
    "out", "plugin", "devices", "stream", "steps_per_call", "checkpoint_seconds", "log_every", "test_every", "tensorboard",
    "coordinator", "num_processes", "process_id", "cost_rounds", "vmapped", "attack",
)  # fmt: skip
"""Flags that say where and how fast, not what: a run may go on with others."""


CHOICE = ("methods", "seeds", "over", "cross", "reference")
"""Flags that choose among runs: each run has its own folder, and its method and seed among its settings."""


LATER = {"shortcut": "A", "background": "white", "skip_damaged": False}
"""Flags that folders of earlier versions don't have, and what they stood for there."""


CHANGED = {"gradient_noise": "eta", "robust_regression": "space", "robust_lasso": "space", "rlr": "weight"}
"""Settings whose defaults were others in version 0.1.0: folders of runs that leave them unsaid say which they had."""


def method_identity(typed: str, plugins: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a method as typed adds to a run's settings: its name, and the defaults that it takes and that have changed."""
    registry, unsaid = taxonomy.registry(plugins), dict[str, Any]()
    for call in spec.resolve(spec.parse_chain(typed), registry, taxonomy.helpers()):
        make = registry[call.name]
        name, given = make.__name__, dict(call.kwargs)
        if (key := CHANGED.get(name)) is not None and key not in given:
            unsaid[f"{name}.{key}"] = inspect.signature(make).parameters[key].default
    return {"method": typed} | ({"defaults": unsaid} if unsaid else {})


def identity(settings: Settings, dataset: Dataset, **more: Any) -> dict[str, Any]:
    """The settings and data that make a run what it is, for its folder; `more` is what the run adds to them."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in (*RUNTIME, *CHOICE)}
    for name, without in LATER.items():
        if kept[name] == without:
            del kept[name]
    # The data by name, since its path may change; its labels and the choice of samples by their hash.
    found = {"data": dataset.name, "train_size": len(dataset.train_labels), "subset_hash": dataset.subset_hash}
    found |= {"images_hash": images_hash(dataset.train_images), "plugin_hash": [file_hash(path) for path in settings.plugin]}
    found |= {"test_hash": images_hash(dataset.test_images), "parallel": settings.parallel}
    if settings.parallel == "pmap":  # each device has BatchNorm and mixing of its own: their number changes the results
        found["parallel"] = f"pmap over {devices_of(settings).count} devices"
    files = {"weights_hash": settings.weights, "vectors_hash": settings.vectors}
    if "method" in kept:
        more = method_identity(kept["method"], settings.plugin) | more
    return kept | found | {key: blocks_hash(path) for key, path in files.items() if path is not None} | more


def images_hash(images: np.ndarray, at_most: int = 4096) -> str:
    """12 hex digits of the images, or of that many of them at equal distances."""
    step = -(-len(images) // at_most)
    return hashlib.sha256(np.ascontiguousarray(images[::step]).tobytes()).hexdigest()[:12]


def blocks_hash(path: str, blocks: int = 1024, size: int = 4096) -> str:
    """12 hex digits of a large file: its length, and that many blocks at equal distances, which are all of it below 4 MiB."""
    length = os.stat(path).st_size
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for start in range(0, length, max(size, -(-length // blocks))):
            file.seek(start)
            digest.update(file.read(size))
    return digest.hexdigest()[:12]


def file_hash(path: str) -> str:
    """12 hex digits of a file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"


def digest(text: str) -> str:
    """Four hex digits that tell names apart which look the same in a path."""
    return hashlib.sha256(text.encode()).hexdigest()[:4]


def run_place(out: pathlib.Path, typed: str) -> pathlib.Path:
    """Where the runs of a method lie in a script's folder."""
    return out / "runs" / f"{slug(typed)}-{digest(typed)}"


def prepare_out(out: str | None, script: str, view: str, identity: dict) -> RunFolder:
    """The output folder, made, locked and claimed for these settings before any training.

    Without --out: runs/SCRIPT-DATA-VIEW, or that name with -2, -3 …, the first one that is new or was begun with these settings.
    """
    if out is not None:
        return claimed(pathlib.Path(out), identity)
    name = f"{script}-{slug(identity['data'])}-{slug(view)}"
    for number in itertools.count(1):
        with contextlib.suppress(OtherSettings):
            return claimed(pathlib.Path("runs") / (name if number == 1 else f"{name}-{number}"), identity)
    raise AssertionError  # the count has no end


def finished_run(folder: RunFolder) -> History | None:
    """What a finished run left; None if it isn't finished. A damaged file is put aside: the last checkpoint has the run."""
    if not folder.finished.exists():
        return None
    try:
        return History.load(folder.finished)
    except ValueError:
        aside = folder.finished.with_name("damaged-" + folder.finished.name)
        print(f"{folder.finished} is damaged: put aside as {aside.name}.", file=sys.stderr)
        folder.finished.rename(aside)
        return None


def claimed(path: pathlib.Path, identity: dict) -> RunFolder:
    """The folder, begun with these settings; unlocked again if it was begun with others.

    Raises OtherSettings for one that was, also while another process trains in it, which for the same settings is FolderInUse.
    """
    try:
        folder = RunFolder(path)
    except FolderInUse:
        if (path / RUN).exists():  # or else it has just been made
            compare_settings(path, identity)
        raise
    try:
        folder.claim(identity)
    except ValueError:  # whatever is wrong with it
        folder.close()
        raise
    return folder
