"""What a finished run leaves behind, in memory and as one file."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

ARRAYS = ("logits", "plain_losses", "perturbed_losses", "loss_labels")


def every_epoch(accuracy: list[float]) -> list[int]:
    """The epochs tested by a run of a version that tested after each one."""
    return list(range(1, len(accuracy) + 1))


@dataclasses.dataclass
class History:
    """The record of one run."""

    accuracy: list[float]
    """Test accuracy after each of the epochs `tested`, as a fraction."""
    tested: list[int]
    """Those epochs, counted from 1; the last one is always among them."""
    loss: list[float]
    """Mean training loss (perturbed) of each epoch."""
    logits: np.ndarray
    """[M, C] test logits after the last epoch."""
    seconds: float
    """Wall-clock time of the training steps, without compilation and evaluation; over all parts of an interrupted run."""
    gradient_evaluations: float
    """Gradients with respect to the parameters, per step."""
    inner_evaluations: float
    """Gradients with respect to a perturbed value, per step."""
    metrics: dict[str, float]
    """The links' metrics, averaged over the last epoch."""
    losses: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    """Plain losses, perturbed losses and labels of training samples at the end; None without perturbations of the loss."""
    balanced_accuracy: list[float | None] = dataclasses.field(default_factory=list)
    """Mean of the classes' accuracies after each of the epochs `tested`; None, or nothing, where a version without it tested."""
    macro_f1: list[float | None] = dataclasses.field(default_factory=list)
    """Mean of the classes' F1, likewise."""
    memorised: float | None = None
    """Share of the training samples with a known wrong label that are predicted as that label at the end; None without any."""
    examples_per_second: float = 0.0
    """Training samples over `seconds`."""
    peak_memory: int = 0
    """Bytes, the most so far: of the device where it tells, else of the process; what the process trained before counts, too."""
    state: Any = None
    """The TrainState at the end; None for a run read from its file."""
    progress: dict | None = None
    """What a checkpoint of that state keeps beside it; None for a run read from its file."""

    def save(self, path: str | os.PathLike) -> None:
        """Writes everything but the state to an .npz file, whole or not at all."""
        path = pathlib.Path(path)
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("logits", "losses", "state")
        }
        arrays = dict(zip(ARRAYS, (self.logits, *(self.losses or ())), strict=False))
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            np.savez(file, record=np.array(json.dumps(values)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "History":
        """Reads what `save` wrote. Raises ValueError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = json.loads(str(file["record"]))
                found = [file[name] for name in ARRAYS if name in file]
            values.setdefault("tested", every_epoch(values["accuracy"]))
            return cls(logits=found[0], losses=tuple(found[1:]) or None, **values)
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, zlib, JSON and key errors alike
            raise ValueError(
                f"History.load needs a finished run's file, got {str(path)!r}, which is damaged ({type(error).__name__}). "
                "Delete it: the run goes on from its last checkpoint."
            ) from error
