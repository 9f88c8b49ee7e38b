"""perturbjax.models.describe: every model comes back equal through JSON, and takes its own variables."""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import MLP, NAMES, create
from perturbjax.models.describe import describe, from_description

SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, dict(width=4, dtype=jnp.bfloat16, head="cosine", dropout=0.1, conv="lax", remat=True)])
def test_every_model_comes_back_equal_through_json(name, options):
    model = create(name, **SHARED, **options)
    found = from_description(json.loads(json.dumps(describe(model))))
    assert found == model and hash(found) == hash(model) and found.sites == model.sites


def test_the_model_that_comes_back_takes_the_variables():
    model, images = (
        create("resnet8", width=4, **SHARED),
        jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)), jnp.float32),
    )
    variables = model.init(jax.random.key(0), images)
    found = from_description(json.loads(json.dumps(describe(model))))
    np.testing.assert_array_equal(found.apply(variables, images), model.apply(variables, images))


def test_all_fields_are_written_defaults_too():
    found = describe(MLP(**SHARED))
    assert (found["format"], found["class"]) == (1, "perturbjax.models.mlp.MLP")
    assert set(found["fields"]) == {f.name for f in dataclasses.fields(MLP)} - {"parent", "name"}
    some = {"num_classes": 5, "mean": [0.5, 0.4, 0.3], "head": "linear", "dtype": {"dtype": "float32"}, "hidden": [128, 64]}
    assert {name: found["fields"][name] for name in some} == some


def test_numbers_of_numpy_are_plain_ones():
    fields = describe(MLP(num_classes=np.int64(5), mean=(np.float32(0.5),), std=(1.0,)))["fields"]
    assert fields["num_classes"] == 5 and json.loads(json.dumps(fields))["mean"] == [0.5]


def test_what_can_t_be_written_is_an_error():
    class Own(nn.Module):
        size: int = 3

    class Strange(MLP):
        activation: Any = nn.relu

    Strange.__module__ = "perturbjax.models.strange"
    with pytest.raises(ValueError, match="describe needs a model of perturbjax.models, got .*Own"):
        describe(Own())
    for value in (nn.relu, np.zeros(2), {"a": 1}):
        with pytest.raises(ValueError, match="describe needs fields of numbers, words, tuples and dtypes, got activation="):
            describe(Strange(activation=value, **SHARED))


def test_what_can_t_be_read_is_an_error():
    good = describe(MLP(**SHARED))
    for change, message in [
        ({"format": 2}, "from_description needs a description of format 1, got 2"),
        ({"class": "os.path.join"}, "from_description needs a class of perturbjax.models, got os.path.join"),
        (
            {"class": "perturbjax.modelsx.MLP"},
            "from_description needs a class of perturbjax.models, got perturbjax.modelsx.MLP",
        ),
        ({"class": "perturbjax.models.mlp.MLQ"}, "from_description needs a class of this version"),
        ({"class": "perturbjax.models.mpl.MLP"}, "from_description needs a class of this version"),
        ({"fields": good["fields"] | {"depth": 3}}, "from_description needs fields that MLP has, got depth too"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_description(good | change)
