"""perturbjax.training.FineTuning: class-balanced batches at a tenth of the rate in the last part, however the run is carried out."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from experiments import shared
from experiments.leaveout import plan
from perturbjax.data.dataset import take
from perturbjax.training import Devices, FineTuning, Interrupted, Options, RunFolder, Schedule, fit
from perturbjax.training.feed import Feed
from perturbjax.training.step import build
from tests.training.problem import NUMBERS, dataset, recipe

pytestmark = pytest.mark.optax_promotes  # schedules

ROWS = np.array([*range(0, 48, 3), 1, 4, 7, 10, 2, 5])  # the label of a row is its number modulo 3
NUMBERS = NUMBERS | {"weight_decay": 0.0}


def skewed():
    """22 samples: 16, 4 and 2 of the classes."""
    found = take(dataset(), ROWS)
    assert found.class_counts.tolist() == [16, 4, 2]
    return found


def tuned(numbers):
    return (pj.balanced_fine_tuning(form="samples", start=0.5),)


def long(build=tuned, **changes):
    options = dict(epochs=4, batch_size=6, schedule=Schedule("constant", 0), fine_tuning=FineTuning(start=0.5))
    return dataclasses.replace(recipe(build), num_examples=len(ROWS), **options | changes)


def run(**options):
    return fit(long(), skewed(), NUMBERS, 0, options=Options(say=lambda text: None, **options))


@pytest.fixture(scope="module")
def undisturbed():
    return run()


def assert_equal(a, b, **tolerance):
    close = lambda x, y: np.testing.assert_allclose(x, y, **tolerance) if tolerance else np.testing.assert_array_equal(x, y)
    jax.tree.map(close, (a.state.params, a.logits, a.loss), (b.state.params, b.logits, b.loss))


def test_batches_are_the_usual_ones_first_and_class_balanced_then():
    d, plain, own = skewed(), long(fine_tuning=None, build=lambda numbers: ()), long()
    calls = lambda r: [np.asarray(c.index[0]) for c in Feed(r, [d], [0], Devices(), 1, False, False).calls(0)]
    usual, ours = calls(plain), calls(own)
    assert len(usual) == len(ours) == 12
    np.testing.assert_array_equal(usual[:6], ours[:6])
    for epoch in (ours[6:9], ours[9:]):
        assert np.bincount(d.train_labels[np.concatenate(epoch)]).tolist() == [6, 6, 6]
    assert any((a != b).any() for a, b in zip(ours[6:9], ours[9:], strict=True))


def test_the_learning_rate_is_a_tenth_of_the_schedules_from_there_on():
    r = long(schedule=Schedule("step", 0, milestones=(1.0,)))
    factors = [float(r.rate_factor(jnp.int32(step))) for step in (0, 2, 3, 5, 6, 11)]
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    # In the update too: plain SGD's length is proportional to it.
    numbers = NUMBERS | {"momentum": 0.0}
    tx = build(long(momentum=False), numbers, np.array([16, 4, 2]))[1]
    grads = {"w": jnp.ones(2)}
    state, sizes = tx.init(grads), []
    for _ in range(12):
        updates, state = tx.update(grads, state, grads)
        sizes.append(-float(updates["w"][0]))
    np.testing.assert_allclose(sizes, [0.1] * 6 + [0.01] * 6, rtol=1e-6)


def test_an_interrupted_run_ends_bit_for_bit_as_if_undisturbed(undisturbed, tmp_path):
    def stop(epoch, found):
        if epoch == 2:  # within the last part
            os.kill(os.getpid(), signal.SIGTERM)

    with RunFolder(tmp_path) as folder:
        with pytest.raises(Interrupted):
            fit(long(), skewed(), NUMBERS, 0, folder=folder, on_epoch=stop, options=Options(say=lambda text: None))
        again = fit(long(), skewed(), NUMBERS, 0, folder=folder, options=Options(say=lambda text: None))
    assert_equal(undisturbed, again)


def test_streamed_in_longer_calls_and_on_several_devices_it_is_the_same(undisturbed):
    assert_equal(undisturbed, run(stream=True))
    assert_equal(undisturbed, run(steps_per_call=3), rtol=1e-5, atol=1e-6)
    assert_equal(undisturbed, run(devices=Devices(2)), rtol=1e-4, atol=1e-5)


def test_it_is_not_plain_training_and_rare_classes_gain(undisturbed):
    plain = fit(long(fine_tuning=None, build=lambda numbers: ()), skewed(), NUMBERS, 0)
    assert plain.accuracy[:2] == undisturbed.accuracy[:2] and plain.loss[:2] == undisturbed.loss[:2]
    assert plain.loss[2] != undisturbed.loss[2]


def test_whole_epochs_and_at_least_the_last_one():
    assert [FineTuning(0.9).first_epoch(n) for n in (1, 2, 5, 10, 30, 200)] == [0, 1, 4, 9, 27, 180]
    assert FineTuning(1.0).first_epoch(7) == 6 and FineTuning(0.0).first_epoch(7) == 0


def test_a_trainer_that_does_not_draw_so_is_an_error():
    for changes, got in ((dict(fine_tuning=None), "none"), (dict(fine_tuning=FineTuning(0.8)), "them after 0.8")):
        message = f"balanced_fine_tuning needs class-balanced batches after the share 0.5 of training, got {got}. Write Recipe"
        with pytest.raises(ValueError, match=message):
            fit(long(**changes), skewed(), NUMBERS, 0)
    with pytest.raises(ValueError, match="FineTuning needs 0 <= start <= 1, got 2"):
        FineTuning(start=2.0)


def test_its_name_on_the_command_line_asks_the_trainer():
    found = shared.parse_methods("ce, cbft, la+cbft(form=samples), cbft(form=samples, start=0.8, rate=0.05)")
    tunings = [method.fine_tuning for method, _ in found.values()]
    assert tunings == [None, None, FineTuning(0.9, 0.1), FineTuning(0.8, 0.05)]
    settings = shared.Settings(view="none", epochs=10)
    recipes = [shared.make_recipe(settings, dataset(), method) for method, _ in found.values()]
    assert [r.fine_tuning for r in recipes] == tunings


def test_batches_of_domains_are_drawn_otherwise():
    [(method, _)] = shared.parse_methods("cbft(form=samples)").values()
    d = dataset()
    d = dataclasses.replace(d, train_domains=np.arange(48) % 2, domain_names=("a", "b"))
    with pytest.raises(ValueError, match="got domains.py, which draws from every domain alike. Write form=weights"):
        plan.recipe_of(plan.DomainsSettings(model="mlp"), d, method)
