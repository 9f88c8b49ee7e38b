"""Names that people type: the nearest known one, what papers call a setting, and values by position.

A wrong name is answered with the right one first. Papers and other libraries call the same things otherwise (ρ for a radius, λ for a
weight): `SYMBOLS` says which of this library's names may be meant, and the method's own signature which of them it has.
"""

import difflib
import functools
import inspect
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

SHORT = 12  # of a list that long all names are shown

SYMBOLS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("rho", "perturbation_radius"): ("radius",),
    ("eps", "epsilon", "max_norm", "clip_norm", "magnitude"): ("bound", "radius", "eps1"),
    ("alpha", "kappa", "lr", "learning_rate", "step_length"): ("step_size", "weight", "strength", "alpha"),
    ("lam", "lambda", "lambda_", "lambd", "lamda", "coef", "coefficient", "factor"): ("weight", "strength", "alpha"),
    ("gamma",): ("weight", "strength", "decay"),
    ("eta",): ("step_size", "bound"),
    ("sigma", "std"): ("noise_multiplier", "eta"),
    ("layer", "layers", "location", "at"): ("site", "sites"),
    ("k", "steps", "iterations", "iters", "n_steps", "num_iter"): ("num_steps", "every", "replays", "num_neighbours"),
    ("p", "prob", "drop_rate", "drop_prob", "keep_prob"): ("rate", "probability"),
    ("probability",): ("rate",),
    ("rate",): ("probability",),
    ("noise_rate", "noise"): ("rate", "eta"),
    ("m",): ("margin", "replays", "every"),
    ("s",): ("scale",),
    ("t", "temp", "tau"): ("temperature", "tau", "num_steps"),
    ("temperature",): ("tau",),
    ("threshold",): ("tau", "split"),
    ("smoothing", "label_smoothing"): ("weight",),
    ("beta", "momentum", "ema"): ("decay", "alpha"),
    ("ball", "ord", "order"): ("norm", "p"),
    ("period", "interval"): ("every",),
    ("sign",): ("direction", "step"),
    ("weight",): ("strength", "tau"),
    ("radius",): ("bound",),
    ("bound",): ("radius",),
    ("nu", "noise_scale"): ("noise_multiplier", "eta"),
}
"""What a setting is called elsewhere -> what it may be called here, the likeliest first."""

_MEANT = {symbol: names for symbols, names in SYMBOLS.items() for symbol in symbols}


def near(name: str, known: Iterable[str], most: int = 4, similar: float = 0.5) -> list[str]:
    """The known names nearest to `name`, the nearest first; capitals, hyphens and underscores don't count.

    similar: the least share of letters in common, in [0, 1].

    >>> near("SAM", ["ce", "asam", "sam"])
    ['sam', 'asam']
    """
    spelled: dict[str, str] = {}
    for one in known:
        spelled.setdefault(_plain(one), one)
    close = difflib.get_close_matches(_plain(name), [*spelled], most, similar)
    return [spelled[one] for one in close]


def setting(name: str, known: Iterable[str]) -> str:
    """Which of a method's settings is meant by `name`: spelled otherwise, called otherwise (SYMBOLS), or near; "" for none.

    >>> setting("rho", ["radius", "p"]), setting("ρ", ["radius", "p"]), setting("raduis", ["radius", "p"]), setting("rho", ["p"])
    ('radius', 'radius', 'radius', '')
    """
    known = list(known)
    word = _plain(unicodedata.name(name, name).split()[-1] if len(name) == 1 else name)
    same = [one for one in known if _plain(one) == word]
    symbol = word if word in _MEANT else name.lower()
    called = [one for one in _MEANT.get(symbol, ()) if one in known]
    return next(iter(same + called + near(name, known, 1)), "")


def listed(parts: Iterable[str], last: str) -> str:
    """The parts as a sentence has them: a, b or c; none, if there are none."""
    *head, tail = [*parts] or ["none"]
    return f"{', '.join(head)} {last} {tail}" if head else tail


def unknown_setting(method: str, name: str, typed: str, known: Iterable[str]) -> str:
    """The message about a setting that a method does not have. typed: its value as it is written."""
    known = list(known)
    meant = setting(name, known)
    line = f"Write {method}({meant}={typed})" if meant else "Remove it"
    return f"{method} needs a setting that it has ({listed(known, 'or')}), got {name}={typed}. {line}."


def too_many(method: str, known: Iterable[str], typed: str, surplus: int) -> str:
    """The message about more values by position than there are settings."""
    known = list(known)
    most = f"{len(known)} setting{'s' * (len(known) != 1)} ({listed(known, 'and')})"
    return f"{method} needs at most {most}, got {typed}. Remove the last {surplus}."


def unknown_name(name: str, table: Mapping[str, Any]) -> str:
    """The message about a name that is not in a registry: the nearest first, all names where they are few."""
    close = near(name, table)
    if len(table) <= SHORT:
        return f"a spec needs a known name ({listed(table, 'or')}), got {name}. Write {close[0] if close else 'one of these'}."
    write = f"Write {close[0]}" + (f" (near it: {', '.join(close[1:])})" if close[1:] else "") + ". " if close else ""
    methods = any(hasattr(factory, "coordinates") for factory in table.values())
    where = ": --list, or python -m perturbjax.taxonomy" if methods else f": {', '.join(table)}"
    return f"a spec needs a known name, got {name}. {write}All {len(table)} names{where}."


def by_name(factory: Callable, values: tuple, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one call by their names: `values` fill them in the order of the declaration, as on the command line.

    Raises:
      TypeError: more values than settings, a setting twice, or one that the factory does not have; says what to write.
    """
    name, known = factory.__name__, _settings_of(factory)
    if known is None:  # it takes any
        return dict(settings)
    if (surplus := len(values) - len(known)) > 0:
        raise TypeError(too_many(name, known, f"{len(values)} values", surplus))
    given = dict(zip(known, values, strict=False))
    for key, value in settings.items():
        if key in given:
            raise TypeError(f"{name} needs {key} once, got it by position and by name. Remove {key}={_shown(value)}.")
        if key not in known:
            raise TypeError(unknown_setting(name, key, _shown(value), known))
    return given | dict(settings)


@functools.cache
def _settings_of(factory: Callable) -> tuple[str, ...] | None:
    found = inspect.signature(factory).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in found) else tuple(p.name for p in found)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | None) else "..."


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
