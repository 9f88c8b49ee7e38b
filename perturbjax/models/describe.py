"""A model as plain data and back: what a run keeps beside its checkpoints, so that its net can be made again without its flags.

    describe(create("resnet20", num_classes=10, ...))
    {"format": 1, "class": "perturbjax.models.resnet.ResNet", "fields": {"num_classes": 10, "mean": [...], ..., "depth": 20}}

All fields are written down, defaults too: a later version's defaults change nothing in what comes back.
"""

import dataclasses
import importlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

FORMAT = 1
PACKAGE = "perturbjax.models"


def describe(model: nn.Module) -> dict[str, Any]:
    """A JSON-able description of a model of this package.

    Raises ValueError for a module of another package, or one with a field that is no plain value (numbers, words, tuples, dtypes).
    """
    kind = type(model)
    if not isinstance(model, nn.Module) or not f"{kind.__module__}.".startswith(PACKAGE + "."):
        raise ValueError(
            f"describe needs a model of {PACKAGE}, got {kind.__module__}.{kind.__qualname__}. "
            "Keep what makes your own model beside its run."
        )
    fields = {f.name: _plain(f.name, getattr(model, f.name)) for f in _own(kind)}
    return {"format": FORMAT, "class": f"{kind.__module__}.{kind.__qualname__}", "fields": fields}


def from_description(description: dict[str, Any]) -> nn.Module:
    """The model that was described: equal to it, so that it has the same sites and takes the same variables.

    Raises ValueError for a description of another format, of a class outside this package, or with fields that the class has not.
    """
    number, path, given = (description.get(key) for key in ("format", "class", "fields"))
    if number != FORMAT:
        raise ValueError(
            f"from_description needs a description of format {FORMAT}, got {number}. "
            "Another version of perturbjax wrote it: install that one."
        )
    module, _, name = str(path).rpartition(".")
    if not f"{module}.".startswith(PACKAGE + "."):  # a description is data, and must not run other code
        raise ValueError(f"from_description needs a class of {PACKAGE}, got {path}.")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"from_description needs a class of this version of {PACKAGE}, got {path}, which isn't there."
        ) from None
    unknown = sorted(set(given) - {f.name for f in _own(kind)})
    if unknown:
        raise ValueError(
            f"from_description needs fields that {name} has, got {', '.join(unknown)} too. "
            "A newer version of perturbjax wrote it: install that one."
        )
    return kind(**{key: _value(value) for key, value in given.items()})


def _own(kind: type) -> list[dataclasses.Field]:
    """The fields that a user sets; Flax adds parent and name."""
    return [f for f in dataclasses.fields(kind) if f.init and f.name not in ("parent", "name")]


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(name, x) for x in value]
    if isinstance(value, type | np.dtype) or hasattr(value, "dtype") and not hasattr(value, "shape"):  # np.float32, jnp.float32
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(
        f"describe needs fields of numbers, words, tuples and dtypes, got {name}={value!r}. Choose by a word instead."
    )


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(x) for x in value)  # Flax modules are hashable
    if isinstance(value, dict):
        return getattr(jnp, value["dtype"])
    return value
