"""The folder of a run: what it is (run.json, model.json), its log (metrics.jsonl), its checkpoints, and its end (finished.npz).

A folder belongs to one set of settings. The same command finds its own work there and goes on; another one is refused.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from perturbjax.models.describe import describe
from perturbjax.training.checkpoint import FORMAT, CheckpointNotWritten, NewerCheckpoint, dump_json

RUN, MODEL, LOG, FINISHED, CHECKPOINTS = "run.json", "model.json", "metrics.jsonl", "finished.npz", "checkpoints"

LATER = ("parallel", "test_hash", "weights_hash", "vectors_hash")
"""Settings that folders of earlier versions don't have: what they were is not known there, so anything is accepted."""


class OtherSettings(ValueError):
    """A folder that was begun with other settings."""


class FolderInUse(ValueError):
    """A folder that another process is training in."""


class RunFolder:
    """`RunFolder(path)` makes the folder and locks it for this process; `close` (or leaving a `with`) unlocks it.

    Raises ValueError if it can't be made or written, FolderInUse (a ValueError) if another process is training in it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        except OSError as error:
            if (self.path / RUN).exists():  # a finished run can be looked at where nothing can be written
                self._lock = None
                return
            raise ValueError(
                f"RunFolder needs a folder that can be written, got {str(self.path)!r} ({error.strerror}). Name another one with --out."
            ) from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where `Checkpoints` writes."""
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> pathlib.Path:
        """The file that a finished run leaves."""
        return self.path / FINISHED

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Records the run's settings (JSON-able), or compares them with those that are there.

        Raises OtherSettings (a ValueError that shows the differences), NewerCheckpoint for a folder of a later version.
        """
        file = self.path / RUN
        if file.exists():
            compare_settings(self.path, settings)
        elif jax.process_index() == 0:
            dump_json(file, {"format": FORMAT, "settings": json.loads(json.dumps(settings))})

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines to the log, on disk when this returns. Raises CheckpointNotWritten if they can't be written."""
        if jax.process_index() > 0:
            return
        try:
            with open(self.path / LOG, "a") as log:
                log.writelines(json.dumps(line) + "\n" for line in lines)
                log.flush()
                os.fsync(log.fileno())
        except OSError as error:
            raise CheckpointNotWritten(
                f"RunFolder needs room and permission to write in {self.path}, got: {error.strerror}. What was saved is kept; free some "
                "space and give the same command again."
            ) from error

    @property
    def log_size(self) -> int:
        """Bytes of the log."""
        file = self.path / LOG
        return file.stat().st_size if file.exists() else 0

    def cut_log(self, size: int) -> None:
        """Takes away what was logged after the checkpoint that training goes on from."""
        if jax.process_index() == 0 and self.log_size > size:
            os.truncate(self.path / LOG, size)


def compare_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raises OtherSettings, which shows the differences, if the folder was begun with others; NewerCheckpoint, ValueError as `claim`."""
    file, wanted = path / RUN, json.loads(json.dumps(settings))
    try:
        found = json.loads(file.read_text())
        number, there = found["format"], found["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"RunFolder needs a readable {file}, got a damaged one. Restore it, or name another --out.") from error
    if number > FORMAT:
        raise NewerCheckpoint(
            f"RunFolder needs a folder of format {FORMAT} or less, got {number} in {file}: a newer perturbjax made it. "
            "Install that version, or name another --out."
        )
    differences = [
        f"  {key}: {_shown(there, key)} there, {_shown(wanted, key)} now"
        for key in sorted({*there, *wanted})
        if there.get(key) != wanted.get(key) and (key in there or key not in LATER)
    ]
    if differences:
        raise OtherSettings(
            f"RunFolder needs the settings that {str(path)!r} was begun with, got others:\n"
            + "\n".join(differences)
            + "\nGive the same settings again, or name another --out."
        )


def keep_model(path: pathlib.Path, model: Any) -> None:
    """Writes what the net is to `path`/model.json, from which a later run can make it again (as a teacher); not for foreign nets."""
    with contextlib.suppress(ValueError):
        dump_json(path / MODEL, describe(model))


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not set"


def _lock(path: pathlib.Path):
    """An open file that the system unlocks when this process ends, however it ends; None where there are no such locks."""
    if jax.process_index() > 0:  # process 0 holds it for all
        return None
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(path / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderInUse(
            f"RunFolder needs a folder that nobody else trains in, got {str(path)!r}, which another process holds. "
            "Wait for it, or name another --out."
        ) from None
    return file
