"""Interrupted and resumed in any way, a run ends as if nothing had happened; folders know whose they are; divergences are explained."""

import dataclasses
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.training import Devices, History, Interrupted, Options, Run, RunFolder, fit, fit_many, load_variables
from perturbjax.training.feed import Feed, ahead
from perturbjax.training.loop import peak_memory
from tests.training.problem import NUMBERS, dataset, plain, recipe

pytestmark = pytest.mark.optax_promotes  # schedules
SETTINGS = NUMBERS | {"method": (0.2, 0.05)}
EPOCHS = 4  # of 3 steps


def stateful(numbers):
    """Running class statistics, a covariance, random draws and a second gradient: everything that has to be kept."""
    bound, radius = numbers
    return pj.mixup(), pj.isda(), pj.lpl(bound=bound, max_steps=3), pj.lpg(bound=bound), pj.sam(radius=radius)


R = recipe(stateful, model="cnn", epochs=EPOCHS)


def assert_equal(a, b):
    """Bit for bit, the log too."""
    equal = np.testing.assert_array_equal
    key = lambda tree: jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree
    )
    jax.tree.map(equal, key(a.state), key(b.state))
    equal(a.logits, b.logits)
    assert (a.accuracy, a.loss, a.metrics) == (b.accuracy, b.loss, b.metrics)
    jax.tree.map(equal, a.losses, b.losses)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with RunFolder(folder) as place:
        return fit(R, dataset(), SETTINGS, 0, folder=place, options=Options(log_every=2)), (
            folder / "metrics.jsonl"
        ).read_text()


class Killed(BaseException):
    """Stands for kill -9 at this moment: nothing of ours catches it."""


def test_a_run_that_is_killed_anywhere_ends_as_if_undisturbed(undisturbed, tmp_path, monkeypatch):
    """After every third call the process "dies": whatever was not in a checkpoint is gone, the log has lines too many."""
    from perturbjax.training.loop import _Training

    original = _Training._absorb

    def dying(self, pending):
        found = original(self, pending)
        if not self.progress.step % 3 == 1 or self.progress.step <= reached[-1]:
            return found
        reached.append(self.progress.step)
        self._log(found[1])
        raise Killed

    reached, killed = [0], 0
    monkeypatch.setattr(_Training, "_absorb", dying)
    options = Options(checkpoint_seconds=0.0, log_every=2, say=lambda text: None)
    for _ in range(10):
        with RunFolder(tmp_path) as folder:
            try:
                whole = fit(R, dataset(), SETTINGS, 0, folder=folder, options=options)
                break
            except Killed:
                killed += 1
    assert killed == 4
    assert_equal(whole, undisturbed[0])
    assert (tmp_path / "metrics.jsonl").read_text() == undisturbed[1]
    params = load_variables(tmp_path)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, dict(whole.state.params)))


def adaptive(numbers):
    return (pj.lpa(site=("stage1", "stage2"), bound=numbers[0], beta=1.0, direction=1.0, every=10),)


def test_a_resumed_run_knows_the_site_that_was_chosen(tmp_path):
    """The sites are compared in the first two epochs only, the run stops after those: what goes on comes from the checkpoint."""
    r, lines = recipe(adaptive, epochs=EPOCHS), {}
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM) if epoch == 1 else None
    options = Options(log_every=1, say=lambda text: None)
    with RunFolder(tmp_path / "whole") as folder:
        whole = fit(r, dataset(), SETTINGS, 0, folder=folder, options=options)
    with RunFolder(tmp_path / "resumed") as folder:
        with pytest.raises(Interrupted):
            fit(r, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop, options=options)
        assert_equal(fit(r, dataset(), SETTINGS, 0, folder=folder, options=options), whole)
    for name in ("whole", "resumed"):
        lines[name] = (tmp_path / name / "metrics.jsonl").read_text()
    assert lines["resumed"] == lines["whole"]
    logged = json.loads(lines["whole"].splitlines()[-1])
    effects = [logged["lpa/effect_stage1"], logged["lpa/effect_stage2"]]
    assert logged["lpa/site"] == np.argmax(effects) == 1 and min(effects) > 0  # a new state would have 0 and zeros
    np.testing.assert_allclose(np.asarray(whole.state.states[0].effects), effects, rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path, number):
    stop = lambda epoch, found: os.kill(os.getpid(), number) if epoch == 1 else None
    with (
        RunFolder(tmp_path) as folder,
        pytest.raises(Interrupted, match="stopped at step 7 of 12, saved in .* same command goes on") as caught,
    ):
        fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop, options=Options(log_every=2))
    assert caught.value.signal_number == number
    said = []
    with RunFolder(tmp_path) as folder:
        whole = fit(R, dataset(), SETTINGS, 0, folder=folder, options=Options(log_every=2, say=said.append))
    assert len(said) == 1 and said[0].endswith("goes on after step 7 of 12.")
    assert_equal(whole, undisturbed[0])
    assert (tmp_path / "metrics.jsonl").read_text() == undisturbed[1]


def test_testing_less_often_changes_nothing_but_the_curve(undisturbed, tmp_path):
    """Begun with a test after each epoch by a version that kept no list of them, gone on with one after every third."""
    whole = undisturbed[0]
    assert EPOCHS == 4 and whole.tested == [1, 2, 3, 4]
    seldom = fit(R, dataset(), SETTINGS, 0, options=Options(log_every=2, test_every=3))
    assert seldom.tested == [3, 4]
    assert_equal(dataclasses.replace(seldom, accuracy=[*whole.accuracy[:2], *seldom.accuracy]), whole)

    found = []

    def stop(epoch, metrics):
        found.append("accuracy" in metrics)
        if epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with RunFolder(tmp_path) as folder, pytest.raises(Interrupted):
        fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop, options=Options(log_every=2))
    books = list((tmp_path / "checkpoints").rglob("progress/metadata"))
    assert books and all('"tested": [1]' in kept.read_text() for kept in books)
    for kept in books:
        kept.write_text(kept.read_text().replace(', "tested": [1]', ""))
    with RunFolder(tmp_path) as folder:
        mixed = fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop, options=Options(log_every=2, test_every=3))
    assert mixed.tested == [1, 3, 4] and found == [True, False, True, True]
    assert_equal(dataclasses.replace(mixed, accuracy=whole.accuracy), whole)
    assert mixed.accuracy == [whole.accuracy[epoch - 1] for epoch in mixed.tested]
    mixed.save(tmp_path / "finished.npz")
    assert type(mixed).load(tmp_path / "finished.npz").tested == [1, 3, 4]


def test_a_run_that_an_earlier_version_began_has_no_balanced_accuracy_until_then(undisturbed, tmp_path):
    whole = undisturbed[0]
    assert len(whole.balanced_accuracy) == len(whole.macro_f1) == EPOCHS and None not in whole.balanced_accuracy

    def stop(epoch, metrics):
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with RunFolder(tmp_path) as folder, pytest.raises(Interrupted):
        fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop)
    for kept in (tmp_path / "checkpoints").rglob("progress/metadata"):
        books = json.loads(kept.read_text())
        del books["balanced_accuracy"], books["macro_f1"]
        kept.write_text(json.dumps(books))
    with RunFolder(tmp_path) as folder:
        resumed = fit(R, dataset(), SETTINGS, 0, folder=folder)
    assert_equal(resumed, whole)
    assert resumed.balanced_accuracy == [None, None, *whole.balanced_accuracy[2:]]
    assert resumed.macro_f1 == [None, None, *whole.macro_f1[2:]]


def test_options_are_checked():
    with pytest.raises(ValueError, match="Options needs test_every >= 1, got 0. Write test_every=1"):
        Options(test_every=0)


@pytest.mark.parametrize("where", ["_end_epoch", "_histories"])
def test_a_signal_after_the_last_step_stops_what_comes_next(undisturbed, tmp_path, monkeypatch, where):
    """During the last evaluation, or while the histories are made: everything is saved, and the caller hears of it."""
    from perturbjax.training.loop import _Training

    original = getattr(_Training, where)

    def stopped(self, state):
        if self.progress.step == R.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state)

    with RunFolder(tmp_path) as folder:
        with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped at step 12 of 12, saved in"):
            patched.setattr(_Training, where, stopped)
            fit(R, dataset(), SETTINGS, 0, folder=folder)
        assert_equal(fit(R, dataset(), SETTINGS, 0, folder=folder, options=Options(say=lambda text: None)), undisturbed[0])


def test_lines_that_are_switched_on_later_average_from_there(undisturbed, tmp_path):
    """Every second step a line: the first one after step 7 has step 8's loss alone, whatever came before without lines."""
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM) if epoch == 1 else None
    with RunFolder(tmp_path) as folder:
        with pytest.raises(Interrupted, match="step 7 of 12"):
            fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop)
        fit(R, dataset(), SETTINGS, 0, folder=folder, options=Options(log_every=2, say=lambda text: None))
    with RunFolder(tmp_path / "every") as folder:
        fit(R, dataset(), SETTINGS, 0, folder=folder, options=Options(log_every=1))
    found, single = (
        [json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (tmp_path, tmp_path / "every")
    )
    [first] = [line for line in found if line["step"] == 8]
    [alone] = [line for line in single if line["step"] == 8 and "epoch" not in line]
    assert first["loss"] == alone["loss"]


def test_without_a_folder_a_signal_ends_the_run_and_handlers_are_as_before():
    before = signal.getsignal(signal.SIGTERM)
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="nothing was saved"):
        fit(R, dataset(), SETTINGS, 0, on_epoch=stop)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "options", [dict(devices=Devices(4)), dict(stream=True), dict(steps_per_call=2)], ids=["devices", "stream", "call"]
)
def test_a_run_goes_on_elsewhere_to_rounding(undisturbed, tmp_path, options):
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM) if epoch == 1 else None
    with RunFolder(tmp_path) as folder:
        with pytest.raises(Interrupted):
            fit(R, dataset(), SETTINGS, 0, folder=folder, on_epoch=stop)
        found = fit(R, dataset(), SETTINGS, 0, folder=folder, options=Options(**options, say=lambda text: None))
    np.testing.assert_allclose(found.logits, undisturbed[0].logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.loss, undisturbed[0].loss, rtol=1e-4)


def test_runs_side_by_side_are_resumed_together(tmp_path):
    runs = [Run(dataset(), SETTINGS, s, "both") for s in range(2)]
    whole = fit_many(R, runs)
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM) if epoch == 1 else None
    with RunFolder(tmp_path) as folder:
        with pytest.raises(Interrupted):
            fit_many(R, runs, folder=folder, on_epoch=stop)
        resumed = fit_many(R, runs, folder=folder, options=Options(say=lambda text: None))
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["method"], x["seed"], x["epoch"]) for x in lines] == [("both", s, e) for e in range(1, 5) for s in range(2)]


def test_a_finished_run_is_read_back_from_its_file(undisturbed, tmp_path):
    whole = undisturbed[0]
    whole.save(tmp_path / "finished.npz")
    back = History.load(tmp_path / "finished.npz")
    assert back.state is None and (back.accuracy, back.metrics, back.seconds) == (whole.accuracy, whole.metrics, whole.seconds)
    np.testing.assert_array_equal(back.logits, whole.logits)
    jax.tree.map(np.testing.assert_array_equal, back.losses, whole.losses)
    assert back.examples_per_second > 0 and back.peak_memory > 0
    (tmp_path / "finished.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match="damaged .* Delete it"):
        History.load(tmp_path / "finished.npz")


def test_where_the_system_does_not_tell_the_peak_memory_is_0(monkeypatch):
    assert peak_memory() > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: the import fails
    assert peak_memory() == 0


def test_a_folder_belongs_to_its_settings(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.claim({"epochs": 3, "method": "lpl", "decay": (0.1,)})
        folder.claim({"epochs": 3, "method": "lpl", "decay": (0.1,)})
        with pytest.raises(
            ValueError, match='(?s)others:\n  epochs: 3 there, 4 now\n  method: "lpl" there, not set now\nGive the same'
        ):
            folder.claim({"epochs": 4, "decay": (0.1,)})
        with pytest.raises(ValueError, match="another process holds"):
            RunFolder(tmp_path)
        (tmp_path / "run.json").write_text('{"format": 99, "settings": {}}')
        with pytest.raises(ValueError, match="a newer perturbjax made it"):
            folder.claim({})
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(ValueError, match="damaged"):
            folder.claim({})
    RunFolder(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can be written, got .*Name another one with --out"):
        RunFolder(tmp_path / "file" / "run")


def explode(site, when):
    """A link that turns the values of its site to inf from a step on."""

    def apply(flow, rest, state, context):
        return flow._replace(value=jnp.where(context.step >= when, jnp.inf, 1.0) * flow.value), state, {}

    return pj.Perturbation(site, lambda context: (), apply, name="exploding")


def nan_update(when):
    def update(updates, state, params=None, *, step=None, **extra):
        return jax.tree.map(lambda g: jnp.where(step >= when, jnp.nan, 1.0) * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def overshoot(when):
    def update(updates, state, params=None, *, step=None, **extra):
        return jax.tree.map(lambda g: jnp.where(step >= when, 1e12, 1.0) * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


CASES = {
    "a link of the loss": (
        lambda n: (pj.lpl(), explode("stage2", 4)), {},
        r"nan at step 5 \(epoch 2, seed 0\). It started at exploding \(link 2 of 2, at site stage2\): the loss of sample \d+ is nan, "
        r"one of 16 such losses of 16; without it, the largest loss of the batch is \d\.\d+. Lower its bound",
    ),
    "a link of the optimiser": (
        lambda n: (pj.sam(), nan_update(3)), {},
        r"at step 5 .* It started in the update of step 4, at nan_update \(link 2 of the optimiser\)",
    ),
    "a link behind one of optax's own": (  # which takes no arguments beside the gradient
        lambda n: (pj.gradient_clipping(bound=1.0), pj.ngd(), nan_update(3)), {},
        r"at step 5 .* It started in the update of step 4, at nan_update \(link 3 of the optimiser\)",
    ),
    "a link that drives the weights apart": (  # every loss is bad then, the plain one too, which has done nothing
        lambda n: (overshoot(2),), {},
        r"At the weights that this step began with, plain cross entropy is bad too: .* from step \d on goes the same way, "
        r"but from weights that overshoot had made: which of them it was can't be told from here\. Train ce with the same settings to see",
    ),
    "links of both kinds that do so": (
        lambda n: (pj.lpg(bound=1e12, direction=1.0, clamp=False), pj.sam()), {},
        r"Plain training is not at fault: from step \d on, on the same batches, it has a loss of \d\.\d+ there\. "
        r"It was lpg and sam that led to these weights",
    ),
    "a learning rate at which plain training goes the same way": (
        lambda n: (pj.lpl(), pj.sam()), {"learning_rate": 1e30},
        r"\. It started in plain cross entropy, before any perturbation: the loss of sample \d+ is \S+, one of \d+ such losses of \d+, "
        r"and training without any goes the same way\. The largest parameter is \S+ in absolute value \(in .*\)\. Lower the learning rate",
    ),
    "the learning rate": (
        plain, {"learning_rate": 1e30},
        r"at step 2 .* plain cross entropy, before any perturbation: .* largest parameter is \d.*e\+\d+ in absolute value \(in .*kernel\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_divergence_names_the_step_the_link_and_the_value(tmp_path, case, together):
    build, numbers, message = CASES[case]
    runs = [Run(dataset(), NUMBERS | numbers, s) for s in range(1 + together)]
    with RunFolder(tmp_path) as folder, pytest.raises(FloatingPointError, match=message) as caught:
        fit_many(
            recipe(build, model="cnn" if "rate" in case else "mlp"),
            runs,
            folder=folder,
            options=Options(checkpoint_seconds=0.0),
        )
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    if "rate" in case and not kept:  # the first update was too much
        return
    assert f"The checkpoint of step {kept[-1]} is kept" in str(caught.value) and kept[-1] <= 4
    params = load_variables(tmp_path)["params"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_large_finite_loss_is_a_divergence_too():
    from perturbjax.training.diagnose import Trouble

    assert Trouble.of(1.0, 0, 0, 10) is None and Trouble.of(-3.0, 0, 0, 10) is None
    for loss in (1e5, float("nan"), float("inf")):
        assert Trouble.of(loss, 3, 0, 10).step == 3


def test_batches_come_in_order_from_any_step():
    feed = Feed(R, [dataset()], [0], Devices(), 2, False, False)
    all_calls = [(c.first, c.steps, np.asarray(c.index)) for c in feed.calls(0)]
    assert [c[:2] for c in all_calls] == [(0, 2), (2, 1), (3, 2), (5, 1), (6, 2), (8, 1), (9, 2), (11, 1)]
    rest = [(c.first, c.steps, np.asarray(c.index)) for c in feed.calls(5)]
    for a, b in zip(all_calls[3:], rest, strict=True):
        assert a[:2] == b[:2]
        np.testing.assert_array_equal(a[2], b[2])


def test_the_reader_in_the_background_hands_on_items_and_errors_and_stops_when_closed():
    def items():
        yield from range(3)
        raise KeyError("lost")

    made = ahead(items(), 2)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="lost"):
        next(made)
    endless = ahead(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()


def test_memorised_wrong_labels_are_counted():
    """A net with momentum and enough steps fits the flipped labels; one that has learnt nothing yet fits about a third of them."""
    from perturbjax.data import apply_views, noise

    noisy = apply_views(dataset(), [noise("symmetric", 0.25)], 0)
    found = {epochs: fit(recipe(epochs=epochs), noisy, NUMBERS | {"learning_rate": 0.1}, 0) for epochs in (1, 80)}
    assert 0 <= found[1].memorised < found[80].memorised and found[80].memorised > 0.5
    assert fit(recipe(epochs=1), dataset(), NUMBERS, 0).memorised is None
