"""Checkpoints: the whole state of a run as plain nested dictionaries of arrays (Orbax), and its progress as JSON beside it.

What is read back is what was written, bit for bit, on any number of devices. The newest checkpoint that can be read counts: one
that a crash or a bad disk has damaged is put aside, and the one before it is taken.
"""

import errno
import json
import logging
import os
import pathlib
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

logging.getLogger("absl").setLevel(logging.CRITICAL + 1)  # Orbax logs every save and, of an error, pages; we raise it

FORMAT = 1
"""Number of the form in which this version writes; a later version's is refused."""


class NewerCheckpoint(ValueError):
    """A checkpoint in a form that only a later version of this library reads."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written: disk full, no permission."""


class Checkpoints:
    """The newest `keep` checkpoints of one run, in `folder`/STEP/. Use as a context manager: leaving waits for the last write.

    Writing happens in the background; its errors are raised by the next call.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2):
        self.folder, self.keep = folder.resolve(), keep
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except CheckpointNotWritten:
            if kind is None:  # or else it would hide what went wrong first
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint (finished or being written); None: there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict) -> None:
        """Starts writing a state of numpy arrays and a JSON-able progress; does nothing for a step that is there already.

        Raises CheckpointNotWritten if this one, or the one before, can't be written; earlier checkpoints stay.
        """
        self.wait()
        if self.latest == step:
            return
        tree = as_tree(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree),
            progress=ocp.args.JsonSave({**progress, "format": FORMAT, "checksums": checksums(tree)}),
        )
        self._guarded(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when the last write has ended; raises CheckpointNotWritten if it failed."""
        self._guarded(self._manager.wait_until_finished)

    def restore(self, like: Any, say: Callable[[str], None] = print) -> tuple[int, Any, dict] | None:
        """(step, state, progress) of the newest checkpoint that can be read, or None.

        Args:
          like: a state of numpy arrays of the same structure, shapes and dtypes.
          say: is given one line for each checkpoint that is damaged; such a one is renamed to damaged-STEP.

        Raises NewerCheckpoint for one written by a later version, ValueError for one of another structure.
        """

        def put_aside(step: int, error: Exception) -> None:
            aside = self.folder.with_name(f"damaged-{step}")
            say(f"checkpoint {step} is damaged ({_first_line(error)}): put aside as {aside.name}, the one before it is taken.")
            self._put_aside(step, aside)

        found = self.newest(put_aside)
        if found is None:
            return None
        step, tree, progress = found
        return step, from_tree(tree, like), progress

    def newest(self, damaged: Callable[[int, Exception], None]) -> tuple[int, dict, dict] | None:
        """(step, the state as a tree of arrays, progress) of the newest checkpoint whose checksums agree, or None.

        damaged: called with the step of each newer one that can't be read, and why. Raises NewerCheckpoint.
        """
        _silence_late_readers()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                progress = self._read(step, progress=ocp.args.JsonRestore()).progress
                if progress["format"] > FORMAT:
                    raise NewerCheckpoint(
                        f"restore needs a checkpoint of format {FORMAT} or less, got {progress['format']} in {self.folder / str(step)}: "
                        "a newer perturbjax wrote it. Install that version, or name another --out."
                    )
                tree = self._read(step, state=ocp.args.StandardRestore()).state
                if checksums(tree) != progress.pop("checksums"):  # Orbax doesn't see every flipped bit
                    raise ValueError("the checksums don't agree")
            except (NewerCheckpoint, MemoryError, PermissionError):
                raise
            except Exception as error:  # whatever Orbax, TensorStore or JSON say of broken files
                damaged(step, error)
                continue
            return step, tree, progress
        return None

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _open(self) -> ocp.CheckpointManager:
        # An own folder for the checkpoints: Orbax takes everything in it for a step.
        options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True)
        try:
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointNotWritten(
                f"Checkpoints needs a folder that can be written, got {self.folder} ({error})."
            ) from error

    def _put_aside(self, step: int, aside: pathlib.Path) -> None:
        self._manager.close()
        number = 0
        while aside.exists():
            number += 1
            aside = aside.with_name(f"damaged-{step}-{number}")
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(aside)
        self._manager = self._open()

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # OSError, ValueError or RuntimeError, by the layer that meets the full disk
            good = [step for step in sorted(self._manager.all_steps()) if (self.folder / str(step)).is_dir()]
            kept = f"The checkpoint of step {good[-1]} is kept" if good else "There is no earlier one"
            raise CheckpointNotWritten(
                f"Checkpoints needs room and permission to write in {self.folder}, got: {_first_line(error)}. {kept}; "
                "free some space and give the same command again."
            ) from error


def as_tree(state: Any) -> dict:
    """Any pytree of arrays as nested dictionaries by path, which other programs can read without our classes.

    Arrays of size 0 are left out: Orbax can't write them, and `from_tree` knows them from its template.
    """
    tree: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if np.size(leaf):
            *parents, last = (_name(key) for key in path)
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = leaf
    return tree


def checksums(tree: dict) -> dict[str, int]:
    """CRC-32 of every array, by path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(_name, path)): zlib.crc32(np.ascontiguousarray(leaf).tobytes()) for path, leaf in paths}


def from_tree(tree: dict, like: Any) -> Any:
    """The inverse of `as_tree`, into the structure of `like`. Raises ValueError where they don't fit."""
    stored, wanted = (dict(jax.tree_util.tree_leaves_with_path(t)) for t in (tree, as_tree(like)))
    differing = sorted({jax.tree_util.keystr(path) for path in stored.keys() ^ wanted.keys()})
    differing += [
        f"{jax.tree_util.keystr(path)} ({stored[path].dtype}{list(stored[path].shape)} there, {wanted[path].dtype}"
        f"{list(wanted[path].shape)} wanted)"
        for path in stored.keys() & wanted.keys()
        if (stored[path].shape, stored[path].dtype) != (wanted[path].shape, wanted[path].dtype)
    ]
    if differing:
        raise ValueError(
            f"from_tree needs a checkpoint of the same structure, got {len(differing)} differences, the first at {differing[0]}. "
            "The model's or a method's code has changed since it was written: take another --out."
        )

    def find(path, template):
        if not np.size(template):
            return template
        place: Any = tree
        for key in path:
            place = place[_name(key)]
        return place

    return jax.tree_util.tree_map_with_path(find, like)


def _name(key: Any) -> str:
    """The part of a path as a word: a field's or key's name, or a number."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"as_tree needs paths of names, keys and numbers, got {key!r}.")


def _silence_late_readers() -> None:
    """When a read fails, TensorStore's other readers report to an event loop that is gone: pages that nobody can use."""
    before = sys.unraisablehook

    def hook(what):
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    hook.silent = True  # type: ignore[attr-defined]
    if not hasattr(before, "silent"):
        sys.unraisablehook = hook


def _first_line(error: BaseException) -> str:
    """What the system said, out of the layers' reports around it; or the start of the report."""
    text = str(error).strip()
    system = {
        os.strerror(number)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
    }
    said = [reason for reason in system if reason in text]
    return said[0] if said else (text.splitlines()[0][:100] if text else type(error).__name__)


def load_variables(folder: str | pathlib.Path) -> dict:
    """{"params", "batch_stats"} of the newest checkpoint of a run's folder, as numpy arrays: nothing else need be known of the run.

    Damaged ones are passed over with a warning. Raises FileNotFoundError if there is none, ValueError if all are damaged.
    """
    root = pathlib.Path(folder)
    checkpoints = root / "checkpoints"
    if not checkpoints.is_dir():
        below = [path.parent for runs in ("seed-*", "runs/*/seed-*") for path in root.glob(f"{runs}/checkpoints")]
        way = (
            f"{str(min(below))!r} or another run below"
            if below
            else "train.py's --out, compare.py's OUT/runs/METHOD-xxxx/seed-0"
        )
        raise FileNotFoundError(
            f"load_variables needs the folder of a run, got {str(folder)!r}, which has no checkpoints/. Give it {way}."
        )
    with Checkpoints(checkpoints) as found:
        if found.latest is None:
            raise FileNotFoundError(f"load_variables needs a checkpoint, got none in {str(checkpoints)!r}. Train first.")
        passed_over = lambda step, error: warnings.warn(
            f"checkpoint {step} in {str(checkpoints)!r} is damaged ({_first_line(error)}): the one before it is taken.",
            stacklevel=3,
        )
        newest = found.newest(passed_over)
    if newest is None:
        raise ValueError(f"load_variables needs a checkpoint that can be read, got damaged ones only in {str(checkpoints)!r}.")
    state = newest[1]
    return {"params": state["params"], "batch_stats": state.get("stats", {})}


def dump_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
