"""Checks and measures the library on a GPU: its numbers against the CPU's, its costs, seeds side by side, CIFAR-10-LT.

    PYTHONPATH=. python experiments/gpu_check.py --tiny --out DIR                         # rehearsal on a CPU: about a minute
    PYTHONPATH=. python experiments/gpu_check.py --data CIFAR10LT.npz --out DIR           # everything, on a GPU
    PYTHONPATH=. python experiments/gpu_check.py --out DIR --parts numbers,bench          # what needs no data

    numbers   steps of methods of every target on the GPU and on the CPU from the same state: loss, update, states (PASS or FAIL)
    bench     bench.py's ratios, the trainer's, canonical against lax convolutions, data on the device against streamed
    vmap      seeds trained side by side against one run after the other
    longtail  CIFAR-10-LT at ratio 100, ResNet-32, LDAM's recipe: accuracies and seconds a run
    others    numbers, for all other methods of the library

gpu.json and gpu.md in --out grow with every result, and the same command goes on from there: what is in gpu.json is not measured
again, and a training that was cut off resumes from its checkpoint below --out/runs. On a machine that keeps nothing, gpu.json alone
brings the results along. Needs JAX, Flax, optax, Orbax, scikit-learn, pillow and rich; no tyro, no TFDS, no image codec.
"""

import argparse
import json
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments import shared
from experiments.gpu.check import Check
from experiments.gpu.costs import costs, side_by_side
from experiments.gpu.longtail import check_settings, long_tail
from experiments.gpu.numbers import numbers, others
from experiments.gpu.page import page, troubles
from experiments.gpu.sizes import LONG_TAIL, TINY, Sizes
from perturbjax.checks import check_choice
from perturbjax.models.blocks import CONVOLUTIONS


def main(argv: list[str]) -> None:
    """Runs the parts that were asked for."""
    flags = parse(argv)
    device = find_device(flags.tiny)
    for folder in filter(None, (flags.out, flags.copy)):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    check = Check(flags, TINY if flags.tiny else Sizes(), open_report(flags), device, find_cpu())
    check.report["sessions"].append(session(check))
    check.say(f"{device.device_kind} ({device.platform}), JAX {jax.__version__}")
    check.save()
    if "longtail" in flags.parts or (flags.data and "vmap" in flags.parts):
        check_settings(check)  # a wrong path or method would else be found when the other parts are done
    for part in flags.parts:
        PARTS[part](check)
    check.save()
    print(page(check.report))
    if problems := list(troubles(check.report)):
        raise SystemExit(f"not all right: {'; '.join(problems)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. By argparse and not by tyro as in the other scripts: what is rehearsed here is what runs where tyro is missing."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", required=True, help="folder for gpu.json, gpu.md and the runs; begun work in it goes on")
    add("--copy", help="folder that gets a copy of gpu.json and gpu.md after every result")
    add("--data", help="CIFAR-10 or its long-tailed cut: an .npz file, as for compare.py --data")
    add("--view", help="its view; if not given: longtail(100) for balanced data, none for data that is long-tailed already")
    add("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, separated by commas")
    add("--methods", help="of the long tail, as for compare.py; if not given: in the papers' settings")
    add("--epochs", type=int, help="of the long tail; 200 if not given")
    add("--seeds", type=int, help="of the long tail, and runs side by side; 5 if not given")
    add("--conv", default="auto", help="canonical, lax, or auto: the faster of the two in each part")
    add("--tiny", action="store_true", help="the same code on tiny nets and data, on any device: a rehearsal")
    flags = parser.parse_args(argv)
    flags.parts = [part.strip() for part in flags.parts.split(",")]
    for part in flags.parts:
        check_choice("gpu_check", "--parts", part, PARTS)
    check_choice("gpu_check", "--conv", flags.conv, ("auto", *CONVOLUTIONS))
    flags.seeds = flags.seeds if flags.seeds is not None else 2 if flags.tiny else 5
    flags.epochs = flags.epochs if flags.epochs is not None else 2 if flags.tiny else 200
    flags.methods = flags.methods or ("ce, lpl(bound=0.5)" if flags.tiny else LONG_TAIL)
    if flags.seeds < 2:
        raise ValueError(f"gpu_check needs --seeds of at least 2, got {flags.seeds}. Write --seeds 5.")
    if "longtail" in flags.parts and not (flags.data or flags.tiny):
        raise ValueError(
            "gpu_check needs --data for the part longtail, got none. Write --data CIFAR10LT.npz (docs/results/gpu.md says how to make "
            "it), or --parts numbers,bench,vmap."
        )
    return flags


def find_device(tiny: bool) -> Any:
    """The first device; without an accelerator only for a rehearsal."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        if not tiny:
            raise ValueError(
                f"gpu_check needs a GPU, got {device.device_kind!r}, the only kind of device that this JAX sees. Install JAX for the GPU "
                "(pip install -U 'jax[cuda13]'), unset JAX_PLATFORMS if it says cpu, or write --tiny for a rehearsal on the CPU."
            )
        print("note: no GPU here. This is a rehearsal, and its numbers mean nothing.", flush=True)
    return device


def find_cpu() -> Any:
    """The CPU as a device, beside the GPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"gpu_check needs JAX's CPU device beside the GPU, got none ({error}). Unset JAX_PLATFORMS, or set it to cuda,cpu."
        ) from error


def open_report(flags: argparse.Namespace) -> dict:
    """The report in --out, or a new one."""
    file = pathlib.Path(flags.out) / "gpu.json"
    if not file.exists():
        return {"tiny": flags.tiny, "sessions": []}
    report = json.loads(file.read_text())
    if report["tiny"] != flags.tiny:
        raise ValueError(
            f"gpu_check needs an --out of {'a rehearsal' if flags.tiny else 'the check itself'}, got {file} of the other kind. "
            "Name another --out."
        )
    return report


def session(check: Check) -> dict:
    """What this call ran on; every result has the number of its session."""
    try:
        git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its repository
        commit = None
    return {
        "command": shared.command_line(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": check.device.device_kind,
        "platform": check.device.platform,
        "device_count": jax.device_count(),
        "memory": (check.device.memory_stats() or {}).get("bytes_limit"),
        "versions": shared.versions(),
        "commit": commit,
    }


PARTS: dict[str, Callable[[Check], None]] = {
    "numbers": numbers,
    "bench": costs,
    "vmap": side_by_side,
    "longtail": long_tail,
    "others": others,
}

if __name__ == "__main__":
    shared.start(main)
