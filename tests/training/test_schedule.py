"""perturbjax.training.schedule: the factor step by step, against its formulas, on plain and traced counts; errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perturbjax.training.schedule import KINDS, Schedule

pytestmark = pytest.mark.optax_promotes
EPOCH, TOTAL = 7, 70


def curve(schedule, steps_per_epoch=EPOCH, total_steps=TOTAL):
    """The factor at every step, traced, as the optimiser asks for it."""
    return np.asarray(jax.jit(jax.vmap(schedule.factor(steps_per_epoch, total_steps)))(jnp.arange(total_steps)))


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("epochs", [0.0, 0.05, 1.0, 2.5])
def test_cosine_and_constant_are_bit_for_bit_what_they_were(kind, epochs):
    warmup = int(round(epochs * EPOCH))
    tail = optax.constant_schedule(1.0) if kind == "constant" else optax.cosine_decay_schedule(1.0, max(TOTAL - warmup, 1))
    old = tail
    if warmup >= 1:
        old = optax.join_schedules([optax.linear_schedule(1 / (warmup + 1), 1.0, warmup), tail], [warmup])
    wanted = jax.jit(jax.vmap(lambda step: jnp.float32(old(step))))(jnp.arange(TOTAL))
    np.testing.assert_array_equal(curve(Schedule(kind, warmup_epochs=epochs)).astype(np.float32), wanted)


def test_warm_up_rises_in_equal_steps_from_the_first_to_one():
    for kind, milestones in (("cosine", ()), ("step", (5, 6)), ("constant", ())):
        factor = curve(Schedule(kind, warmup_epochs=2, milestones=milestones))
        np.testing.assert_allclose(factor[:15], np.arange(1, 16) / 15, rtol=1e-5)  # 14 steps, then the base learning rate


def test_ldams_steps():
    factor = curve(Schedule("step", warmup_epochs=5, milestones=(160, 180), decay=(1e-2, 1e-4)), 3, 600)
    exactly = lambda first, last, value: np.testing.assert_array_equal(factor[3 * first : 3 * last], np.float32(value))
    exactly(5, 160, 1.0)
    exactly(160, 180, 0.01)
    exactly(180, 200, 0.0001)


def test_one_decay_multiplies_at_every_milestone():
    schedule = Schedule("step", warmup_epochs=0, milestones=(2, 4.5, 8), decay=0.2)
    np.testing.assert_allclose(schedule.factors, (0.2, 0.04, 0.008))
    factor = curve(schedule)
    changes = np.flatnonzero(np.diff(factor)) + 1
    assert changes.tolist() == [14, round(4.5 * 7), 56]
    np.testing.assert_allclose(factor[[0, *changes]], (1, 0.2, 0.04, 0.008), rtol=1e-6)
    given = Schedule("step", warmup_epochs=0, milestones=(2, 4.5, 8), decay=schedule.factors)
    np.testing.assert_array_equal(factor, curve(given))


def test_milestones_may_meet_the_end_of_the_warm_up_and_each_other_after_rounding():
    np.testing.assert_allclose(curve(Schedule("step", warmup_epochs=2, milestones=(2,)), 5, 20)[10:], 0.1, rtol=1e-6)
    np.testing.assert_allclose(
        curve(Schedule("step", warmup_epochs=0, milestones=(1, 1.1)), 2, 6), [1, 1, *[0.01] * 4], rtol=1e-6
    )


def test_counts_may_be_python_numbers_and_lie_beyond_the_end():
    for schedule in (Schedule(), Schedule("constant"), Schedule("step", milestones=(3,))):
        factor = schedule.factor(EPOCH, TOTAL)
        np.testing.assert_allclose([float(factor(t)) for t in (0, 5, 40)], curve(schedule)[[0, 5, 40]], rtol=1e-6, atol=1e-7)
        assert float(factor(10 * TOTAL)) == pytest.approx({"cosine": 0, "constant": 1, "step": 0.1}[schedule.kind])


def test_a_warm_up_ends_within_the_run():
    with pytest.raises(ValueError, match="a warm-up within the run, 3 epochs, got warmup_epochs=5: .* Write warmup_epochs=0.3"):
        Schedule(warmup_epochs=5).factor(10, 30)
    Schedule(warmup_epochs=3).factor(10, 30)


def test_it_drives_an_optimiser_under_jit_and_scan():
    factor = Schedule("step", warmup_epochs=0, milestones=(1, 2)).factor(2, 6)
    tx = optax.sgd(lambda count: 0.5 * factor(count))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jnp.float32(1), state, w)
        return (optax.apply_updates(w, updates), state), updates

    w = jnp.float32(0)
    _, moves = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=6))()
    np.testing.assert_allclose(moves, -0.5 * np.array([1, 1, 0.1, 0.1, 0.01, 0.01]), rtol=1e-5)


def test_equal_schedules_share_a_compilation():
    a, b = Schedule("step", milestones=[3, 5], decay=[0.1, 0.01]), Schedule("step", milestones=(3, 5), decay=(0.1, 0.01))
    assert a == b and hash(a) == hash(b) and len({Schedule(), Schedule("constant"), a, b}) == 3


ERRORS = {
    "kind": (lambda: Schedule("cosin"), "got 'cosin'. Did you mean 'cosine'?"),
    "no milestones": (lambda: Schedule("step"), "got 'step' with milestones=(). Write Schedule('step', milestones=(100, 150))"),
    "milestones elsewhere": (lambda: Schedule(milestones=(3,)), "got 'cosine' with milestones=(3,)"),
    "order": (lambda: Schedule("step", milestones=(5, 3)), "increasing milestones, got (5, 3). Write (3, 5)"),
    "twice": (lambda: Schedule("step", milestones=(3, 3)), "increasing milestones, got (3, 3). Write (3,)"),
    "zero": (lambda: Schedule("step", milestones=(0, 3)), "milestones > 0, got (0, 3)"),
    "decay": (lambda: Schedule("step", milestones=(3,), decay=0), "0 < decay <= 1, got 0"),
    "growth": (lambda: Schedule("step", milestones=(3,), decay=10), "0 < decay <= 1, got 10"),
    "decays": (lambda: Schedule("step", milestones=(3, 5), decay=(0.1,)), "each of the 2 milestones, got (0.1,)"),
    "warm-up": (lambda: Schedule(warmup_epochs=-1), "warmup_epochs >= 0, got -1"),
    "warm": (lambda: Schedule("step", warmup_epochs=5, milestones=(2, 8)), "its 5 epochs of warm-up, got (2, 8)"),
    "beyond": (lambda: Schedule("step", milestones=(5, 160)).factor(7, 140), "the run, 20 epochs, got (5, 160). Write"),
    "at the end": (lambda: Schedule("step", milestones=(20,)).factor(7, 140), "the run, 20 epochs, got (20,)"),
}


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_given_and_what_to_write(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_every_kind_is_reachable():
    assert KINDS == ("cosine", "step", "constant")
    for kind in KINDS:
        assert np.isfinite(curve(Schedule(kind, milestones=(3,) if kind == "step" else ()))).all()
