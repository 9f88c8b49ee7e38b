"""Domains in training: they reach the links as side["domain"], by every road, and change nothing where no link looks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.training import Devices, Options, Run, device_data, fit, fit_many, init_state
from perturbjax.training.step import as_arrays, compiled_step
from tests.training.problem import NUMBERS, dataset, plain, recipe

pytestmark = pytest.mark.optax_promotes  # schedules

PENALTIES = np.array([0.0, 10.0, 1000.0])


def with_domains(domains=None):
    d = dataset()
    domains = np.arange(48, dtype=np.int32) // 2 % 3 if domains is None else domains
    return dataclasses.replace(d, train_domains=domains, domain_names=("a", "b", "c"))


def told(numbers):
    """A link that adds a number that depends on the domain: it can be read off the losses."""

    def apply(flow, rest, state, context):
        return flow._replace(penalty=flow.penalty + jnp.asarray(PENALTIES, jnp.float32)[flow.side["domain"]]), state, {}

    return (pj.Perturbation("logits", lambda context: (), apply, needs=("domains",), name="told"),)


@pytest.mark.parametrize("devices", [Devices(), Devices(2), Devices(2, "pmap")])
def test_each_sample_brings_its_domain(devices):
    d, r = with_domains(), recipe(told, num_domains=3)
    data = device_data(d)
    state, numbers, data = (devices.replicate(x) for x in (init_state(r, NUMBERS, data, 0), as_arrays(NUMBERS), data))
    rows = np.random.default_rng(0).permutation(48)[:16].astype(np.int32)[None]
    index = devices.split(rows.shape, 1, lambda where: rows[:, where])
    losses = np.asarray(compiled_step(r, devices)(state, numbers, data, index)[2])[0]
    expected = PENALTIES[d.train_domains[rows[0]]]
    assert (losses > expected).all() and (losses < expected + 9).all()


def test_the_trainer_hands_them_over_also_where_runs_differ_in_them():
    """Runs side by side have each their own."""
    r = recipe(told, num_domains=3, epochs=1)
    runs = [Run(with_domains(np.full(48, domain, np.int32)), NUMBERS, 0) for domain in (0, 2)]
    low, high = (h.loss[0] for h in fit_many(r, runs, options=Options()))
    assert 0 < low < 9 and 1000 < high < 1009
    assert fit(r, runs[1].dataset, NUMBERS, 0).loss[0] == pytest.approx(high)


def test_links_that_do_not_look_train_the_same_bit_for_bit():
    without, with_them = (
        fit(recipe(plain), dataset(), NUMBERS, 0),
        fit(recipe(plain, num_domains=3), with_domains(), NUMBERS, 0),
    )
    jax.tree.map(np.testing.assert_array_equal, without.state.params, with_them.state.params)
    assert without.loss == with_them.loss


def test_data_without_domains_is_an_error_before_anything_compiles():
    with pytest.raises(ValueError, match=r"told needs 'domains', got none. Pass num_domains= and batches with side="):
        fit(recipe(told), dataset(), NUMBERS, 0)
