"""How a script's process behaves: its devices, other processes, signals and errors."""

import logging
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax

from experiments.shared.flags import Settings, devices_of
from experiments.shared.folders import slug
from perturbjax.training import Interrupted, Options


def options(settings: Settings, folder: pathlib.Path | None = None) -> Options:
    """How to train, from the flags; with --tensorboard, events go to `folder`/tensorboard."""
    main = jax.process_index() == 0
    return Options(
        devices=devices_of(settings),
        steps_per_call=settings.steps_per_call,
        stream=settings.stream,
        checkpoint_seconds=settings.checkpoint_seconds,
        log_every=settings.log_every,
        test_every=settings.test_every,
        on_line=tensorboard(folder / "tensorboard") if settings.tensorboard and folder is not None and main else None,
        say=(lambda text: print(text, file=sys.stderr)) if main else (lambda text: None),
    )


def tensorboard(folder: pathlib.Path) -> Callable[[dict], None]:
    """A function that writes a line of the log as TensorBoard scalars."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboardX, got no such module. Write: pip install tensorboardX") from error
    writers: dict[str, Any] = {}

    def write(line: dict) -> None:
        run = "-".join(str(line[key]) for key in ("method", "seed") if key in line)
        if run not in writers:  # what an interrupted run wrote after its checkpoint is hidden
            writers[run] = SummaryWriter(str(folder / slug(run)), purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, float):
                writers[run].add_scalar(name, value, line["step"])
        writers[run].flush()

    return write


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main: a clear error becomes one line and exit code 2; SIGTERM and Ctrl-C say how to go on."""
    cache = pathlib.Path.home() / ".cache" / "perturbjax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    say_warnings()
    before = signal.signal(signal.SIGTERM, stop_early)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that a second Ctrl-C could hurry
        print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.signal_number) from None
    except KeyboardInterrupt:
        print("interrupted. What was saved is kept: the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def say_warnings() -> None:
    """What the package logs is a note like the others, without the logger's name."""
    handler, logger = logging.StreamHandler(), logging.getLogger("perturbjax")
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger.handlers = [handler]
    for other in logging.getLogger().handlers:  # some package's: it would say it again
        if type(other) is logging.StreamHandler:
            other.addFilter(lambda record: not record.name.startswith("perturbjax"))


def raise_diverged(diverged: list[str]) -> None:
    """Raises FloatingPointError if there is something to say."""
    if diverged:
        raise FloatingPointError("\n".join([*diverged, "The results are those of the other methods."]))


def stop_early(number: int, frame: Any) -> None:
    """SIGTERM outside training, which has a handler of its own: there is nothing to save."""
    raise Interrupted("stopped outside training: finished runs are kept. The same command goes on.", number)
