"""Checks of what users pass in, made on the host before anything compiles.

Every message follows one form: `{function} needs {what}, got {value}. {The line to write instead}.` Traced values can't be
looked at and pass unchecked: whoever builds a method inside a trace builds it once outside first (the trainer does).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from perturbjax.label_form import trouble
from perturbjax.names import near


def is_traced(value: Any) -> bool:
    """Whether any leaf of `value` is a JAX tracer, so that its numbers are unknown here."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def on_host(value: Any) -> Any:
    """A jax.Array whose numbers are known, as a Python number ([]) or a numpy array: inside a trace what is computed of a jax.Array
    is traced, and Python can't branch on it. Anything else as it is."""
    known = isinstance(value, jax.Array) and not is_traced(value) and value.is_fully_addressable
    if not known or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):  # keys have no numbers
        return value
    return np.asarray(value) if value.ndim else np.asarray(value).item()


def check_number(
    function: str, *, low: float = -np.inf, high: float = np.inf, open_low: bool = False, infinite: bool = False, **named: Any
) -> None:
    """Raises ValueError unless each named number (or every element of an array) is finite and lies in [low, high].

    None and traced values pass. `open_low=True` excludes `low` itself; `infinite=True` lets ±inf pass where it is within the limits,
    for settings in which it means something ("no bound").
    """
    for name, value in named.items():
        if value is None or is_traced(value):
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"{function} needs a number for {name}, got {value!r}. {_instead(function, name, low, high, open_low)}"
            ) from None
        outside = np.isnan(array) | (array < low) | (array > high) | (open_low & (array == low))
        if not outside.any() and not infinite and np.isinf(array).any():
            raise ValueError(f"{function} needs a finite {name}, got {value}. {_instead(function, name, low, high, open_low)}")
        if outside.any():
            below = "<" if open_low else "<="
            rule = f"{name} {'>' if open_low else '>='} {low:g}" if high == np.inf else f"{low:g} {below} {name} <= {high:g}"
            if low == -np.inf:
                number = "a number" if infinite else "a finite"
                rule = f"{number} {name}" if high == np.inf else f"{name} <= {high:g}"
            first = float(np.extract(outside, array)[0])
            raise ValueError(f"{function} needs {rule}, got {value}. {_instead(function, name, low, high, open_low, first)}")


def _instead(function: str, name: str, low: float, high: float, open_low: bool, value: float = np.nan) -> str:
    """The line to write instead, of a flag as it is typed: the allowed number nearest to `value`; one above an excluded limit, if
    there is room."""
    allowed = float(np.clip(1.0 if np.isnan(value) else value, low, high))
    if open_low and allowed == low:
        allowed = min(low + 1, high)
    return f"Write {function} {allowed:g}." if function.startswith("--") else f"Write {name}={allowed:g}."


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name (if any is close) and lists them all."""
    known = sorted(known)
    close = near(name, known, 1)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(known)}."


def check_choice(function: str, name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the `known` strings; the message has the nearest one."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{function} needs {name} to be one of its names, got {value!r}. {nearest(str(value), known)}")


def check_logits_labels(function: str, logits: Any, labels: Any) -> None:
    """Raises ValueError unless logits are [B, C] with C >= 2 and labels integer [B]; static facts, so it works in a trace."""
    shape, dtype = np.shape(logits), (labels if hasattr(labels, "dtype") else np.asarray(labels)).dtype
    if len(shape) != 2 or np.shape(labels) != shape[:1]:
        raise ValueError(
            f"{function} needs logits [B, C] and labels [B], got {shape} and {np.shape(labels)}. "
            "For sequences, flatten the positions into the batch first: logits.reshape(-1, C)."
        )
    check_classes(function, shape[1])
    if not np.issubdtype(dtype, np.integer):
        got, fix = (f"{dtype}", "Write labels.astype(np.int32).") if is_traced(labels) else trouble(labels)
        raise ValueError(f"{function} needs integer labels, got {got.removeprefix('dtype ')}. {fix}")


def check_classes(function: str, num_classes: int) -> None:
    """Raises ValueError for less than two classes."""
    if num_classes < 2:
        raise ValueError(f"{function} needs at least 2 classes, got {num_classes}. With one class there is nothing to learn.")


def check_class_counts(function: str, class_counts: Any) -> None:
    """Raises ValueError for a class without training samples: says the first one (host only)."""
    if is_traced(class_counts):
        return
    empty = np.flatnonzero(np.asarray(class_counts) <= 0)
    if empty.size:
        raise ValueError(
            f"{function} needs at least one sample of every class, got none of class {empty[0]}. "
            "Drop the class, or relabel so that the labels are 0..C-1 without gaps."
        )


def check_samples(function: str, logits: Any, labels: Any, *, what: str = "logits") -> None:
    """What every bare function of logits [B, C] and labels [B] asks for: shapes and types always, and outside a trace finite
    numbers and labels in 0..C-1. In a trace other labels are padding, which belongs to no class."""
    check_logits_labels(function, logits, labels)
    check_finite(function, logits, what=what)
    check_labels(function, labels, np.shape(logits)[1])


def check_labels(function: str, labels: Any, num_classes: int) -> None:
    """Raises ValueError unless `labels` holds integers in 0..C-1: says the first offender's place and value (host only)."""
    if is_traced(labels):
        return
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        got, fix = trouble(array)
        raise ValueError(f"{function} needs integer labels, got {got.removeprefix('dtype ')}. {fix}")
    bad = np.flatnonzero((array < 0) | (array >= num_classes))
    if bad.size:
        larger = f" or set num_classes={int(array.max()) + 1}" if array.min() >= 0 else ""
        raise ValueError(
            f"{function} needs labels in 0..{num_classes - 1}, got {array[bad[0]]} at position {bad[0]} "
            f"({bad.size} such labels). Drop these rows{larger}."
        )


def check_finite(function: str, logits: Any, *, what: str = "logits") -> None:
    """Raises ValueError for logits [B, C] with nan or infinity: says the first offender's place and value (host only)."""
    if is_traced(logits):
        return
    array = np.asarray(logits)
    bad = np.argwhere(~np.isfinite(array))
    if bad.size:
        place = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{function} needs finite {what}, got {float(array[place])} at {list(place)} "
            f"({len(bad)} such entries). Lower the learning rate, or drop these samples."
        )


def check_index(function: str, index: Any, num_examples: int) -> None:
    """Raises ValueError unless `index` [B] holds positions in 0..N-1: says the first offender's place and value (host only)."""
    if is_traced(index):
        return
    array = np.asarray(index)
    bad = np.flatnonzero((array < 0) | (array >= num_examples))
    if bad.size:
        raise ValueError(
            f"{function} needs indices in 0..{num_examples - 1}, got {array[bad[0]]} at position {bad[0]} of the batch. "
            f"Pass num_examples={int(array.max()) + 1}, the size of the whole training set."
        )


def domains_of(function: str, side: Mapping[str, jax.Array]) -> jax.Array:
    """side["domain"] [B], the domain of each sample; raises ValueError where the batch has none (a static fact)."""
    if "domain" not in side:
        raise ValueError(
            f"{function} needs side['domain'], got {sorted(side)}. Write pj.batch(x, y, side={{'domain': d}}), d [B] in 0..D-1."
        )
    return side["domain"]


def check_domain_count(function: str, num_domains: int | None) -> int:
    """The number of domains; raises ValueError for less than two."""
    if num_domains is None or num_domains < 2:
        raise ValueError(
            f"{function} needs at least 2 training domains, got {num_domains}. Give data with more, or leave it out."
        )
    return num_domains
