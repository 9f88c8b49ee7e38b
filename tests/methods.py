"""The methods that the contract asks: the package's, and those of the files given with `pytest --plugin FILE`."""

import os

import pytest

import perturbjax as pj
from perturbjax import taxonomy

PLUGINS = tuple(filter(None, os.environ.get("PERTURBJAX_TESTED_PLUGINS", "").split(os.pathsep)))
METHODS = [f for f in taxonomy.methods(PLUGINS).values() if hasattr(f, "coordinates")]
LINKS = [f for f in METHODS if hasattr(f(), "update")]
"""The links of the optimiser."""
ASKING = [f for f in LINKS if f.gradient == "replaces"]
"""Those that ask `grad_fn` for gradients."""


def each(methods):
    """Parametrises over methods; optax's own add_noise mixes dtypes."""
    marks = lambda f: [pytest.mark.optax_promotes] if f is pj.gradient_noise else []
    return pytest.mark.parametrize("make", [pytest.param(f, id=f.__name__, marks=marks(f)) for f in methods])
