"""One call of the GPU check: the report that grows with every result, and what its parts share."""

import argparse
import dataclasses
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable
from typing import Any

from experiments.gpu.page import page
from experiments.gpu.sizes import Sizes
from perturbjax.training import Interrupted, Recipe
from perturbjax.training.checkpoint import dump_json

WORTH_IT = 0.98  # convolutions of the other kind are taken if they bring the time below this share


@dataclasses.dataclass
class Check:
    """One call of this script: its flags, its machine, and the report as far as it has come."""

    flags: argparse.Namespace
    sizes: Sizes
    report: dict
    device: Any
    cpu: Any
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def out(self) -> pathlib.Path:
        return pathlib.Path(self.flags.out)

    def entry(self, *place: str) -> dict:
        """The dictionary at this place of the report, made if need be."""
        found = self.report
        for key in place:
            found = found.setdefault(key, {})
        return found

    def measure(self, place: tuple[str, ...], name: str, run: Callable[[], dict]) -> None:
        """Runs what is not in the report yet, and writes the report. An error is a result too: the next call tries again."""
        found = self.entry(*place)
        if name in found and "error" not in found[name]:
            self.say(f"{'/'.join((*place, name))}: there already")
            return
        started = time.perf_counter()
        try:
            found[name] = run()
        except Interrupted:  # the wish to stop: the training has saved its state
            self.save()
            raise
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        took = time.perf_counter() - started
        found[name] |= {"session": len(self.report["sessions"]) - 1, "took": round(took, 2)}
        self.save()
        self.say(f"{'/'.join((*place, name))}: {found[name].get('error', 'done')} ({took:.1f} s)")

    def save(self) -> None:
        """Writes gpu.json and gpu.md, and their copies."""
        self.report["sessions"][-1]["seconds"] = round(time.perf_counter() - self.began, 1)
        dump_json(self.out / "gpu.json", self.report)
        (self.out / "gpu.md").write_text(page(self.report))
        if self.flags.copy:
            for name in ("gpu.json", "gpu.md"):
                shutil.copy(self.out / name, self.flags.copy)

    def say(self, text: str) -> None:
        """A line of progress, at once: a killed run shows how far it came."""
        print(f"[{time.perf_counter() - self.began:7.1f} s] {text}", flush=True)


def with_conv(recipe: Recipe, conv: str) -> Recipe:
    """The recipe with that kind of convolutions, where its model has any."""
    return dataclasses.replace(recipe, model=recipe.model.clone(conv=conv)) if hasattr(recipe.model, "conv") else recipe


def chosen(check: Check, lax: float) -> str:
    """The kind of convolutions to go on with, given the time of lax ones over that of canonical ones."""
    return check.flags.conv if check.flags.conv != "auto" else "lax" if lax < WORTH_IT else "canonical"
