"""perturbjax.parameter.timing: the courses' values, which steps are active, the plateau, the checks, and the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy
from perturbjax.parameter.timing import Course, Place, Timing, at


def place(step=0, total=10, value=None, rate=None):
    return Place(jnp.int32(step), jnp.float32(step / total), value, rate)


def active(timing, steps):
    """The active ones of so many steps."""
    memory, found = timing.init(), []
    for step in range(steps):
        now, memory = timing.active(memory, place(step, steps))
        found += [step] * bool(now)
    return found


def values(course, steps):
    return [float(course.at(place(step, steps))) for step in range(steps)]


def test_cosine_is_the_printed_formula_with_and_without_restarts():
    """η_min + ½(η_max − η_min)(1 + cos(π T_cur/T_max)), T_cur counted from the last restart (RTS draft, section 1; SGDR)."""
    formula = lambda t, length: 0.2 + 0.5 * (0.8 - 0.2) * (1 + np.cos(np.pi * t / length))
    np.testing.assert_allclose(values(pj.cosine(first=0.8, last=0.2), 12), formula(np.arange(12), 12), rtol=1e-6)
    thrice = values(pj.cosine(first=0.8, last=0.2, cycles=3), 12)
    np.testing.assert_allclose(thrice, formula(np.arange(12) % 4, 4), rtol=1e-5)
    growing = values(pj.cosine(first=0.8, last=0.2, cycles=3, growth=2.0), 14)  # of 2, 4 and 8 steps
    wanted = [*formula(np.arange(2), 2), *formula(np.arange(4), 4), *formula(np.arange(8), 8)]
    np.testing.assert_allclose(growing, wanted, rtol=1e-5)
    end = Place(jnp.int32(12), jnp.float32(1), None, None)
    for cycles in (1, 3):
        np.testing.assert_allclose(pj.cosine(first=0.8, last=0.2, cycles=cycles).at(end), 0.2, rtol=1e-6)


def test_cosine_is_optax_s():
    ours, theirs = values(pj.cosine(first=0.7), 20), optax.cosine_decay_schedule(0.7, 20)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(ours, [theirs(step) for step in range(20)], rtol=1e-5, atol=1e-7)


def test_linear_and_by_rate_go_from_end_to_end():
    np.testing.assert_allclose(values(pj.linear(first=0.1, last=0.5), 4), [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    course = pj.by_rate(high=0.6, low=0.2, floor=0.5)
    np.testing.assert_allclose([course.at(place(rate=rate)) for rate in (1.0, 0.75, 0.5)], [0.6, 0.4, 0.2], rtol=1e-6)


@pytest.mark.parametrize("divide", [lambda a, b: a / b, lambda a, b: a * (np.float32(1) / b)], ids=["quotient", "reciprocal"])
def test_shares_of_the_run_are_exact_whatever_float32_makes_of_them(divide):
    """As a product with 1/total, which compilers prefer, 41/82 is less than 0.5."""
    for total in (7, 10, 12, 82, 130):
        progress = divide(np.arange(total, dtype=np.float32), np.float32(total))
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            for timing, begin in [(pj.after(share), share), (pj.last(share), 1 - share)]:
                found = np.flatnonzero(timing.active((), Place(None, progress, None, None))[0])
                assert found.tolist() == list(range(int(np.ceil(round(begin * total, 6))), total))


def test_the_other_timings():
    assert active(pj.always(), 5) == active(pj.after(0.0), 5) == active(pj.last(1.0), 5) == [0, 1, 2, 3, 4]
    assert active(pj.never(), 5) == active(pj.after(1.0), 5) == active(pj.last(0.0), 5) == []
    assert active(pj.every(3), 8) == [0, 3, 6]
    assert active(pj.every(2, start=0.5), 10) == [6, 8]
    assert pj.last(0.5) == pj.after(0.5) and len({pj.every(2), pj.every(2), pj.every(3)}) == 2  # static values


def test_certain_answers_are_python_s_so_that_there_is_no_branch():
    for timing, answer in [(pj.always(), True), (pj.never(), False), (pj.after(0.0), True), (pj.last(0.0), False)]:
        assert timing.active((), place(3))[0] is answer


def on(timing, losses):
    memory, found = timing.init(), []
    for value in losses:
        now, memory = timing.active(memory, place(value=jnp.float32(value)))
        found.append(bool(now))
    return found


def test_a_plateau_begins_after_so_many_steps_without_a_lower_loss():
    losses = [3, 2, 1, 1, 1, 1, 0.5, 0.4, 0.3]
    assert on(pj.plateau(patience=2, decay=0.0), losses) == [False] * 4 + [True] * 5
    assert on(pj.plateau(patience=2, decay=0.0, stay=False), losses) == [False] * 4 + [True] * 2 + [False] * 3
    assert not any(on(pj.plateau(patience=2, decay=0.0), [0.9**i for i in range(20)]))
    assert any(on(pj.plateau(patience=2, decay=0.0, threshold=0.2), [0.9**i for i in range(20)]))  # too slow a fall
    # A running mean of the loss still falls where the loss itself jumps up and down.
    zigzag = [5.5 - 0.2 * i - 0.5 * (i % 2) for i in range(20)]
    assert any(on(pj.plateau(patience=1, decay=0.0), zigzag)) and not any(on(pj.plateau(patience=1, decay=0.9), zigzag))
    assert any(on(pj.plateau(patience=3), [1.0] + [float("nan")] * 5))  # nan is no improvement


def test_what_a_timing_needs_is_named():
    nothing = Place(jnp.int32(0), None, None, None)
    with pytest.raises(ValueError, match=r"timing needs `progress`, got none: call tx.update\(.*progress=step / total_steps\)"):
        pj.last(0.5).active((), nothing)
    with pytest.raises(ValueError, match="cosine needs `progress`, got none"):
        pj.cosine().at(nothing)
    with pytest.raises(ValueError, match="plateau needs `value`, got none: .*value=loss"):
        pj.plateau().active(pj.plateau().init(), nothing)


def test_bad_values_are_errors():
    for call, match in [
        (lambda: pj.after(1.5), "after needs 0 <= fraction <= 1, got 1.5"),
        (lambda: pj.last(-0.1), "last needs 0 <= fraction <= 1, got -0.1"),
        (lambda: pj.every(0), "every needs steps >= 1, got 0"),
        (lambda: pj.every(2, start=2.0), "every needs 0 <= start <= 1, got 2"),
        (lambda: pj.plateau(patience=0), "plateau needs patience >= 1, got 0"),
        (lambda: pj.cosine(first=float("nan")), "cosine needs a finite first, got nan"),
        (lambda: pj.cosine(cycles=0), "cosine needs cycles >= 1, got 0"),
        (lambda: pj.cosine(growth=0), "cosine needs growth > 0, got 0"),
        (lambda: pj.by_rate(floor=1.0), "by_rate needs 0 <= floor <= .*, got 1"),
        (lambda: pj.sam(radius=pj.linear(first=0.1, last=-0.1)), "sam needs radius >= 0, got -0.1"),
        (
            lambda: pj.sam(radius=lambda step: 0.5 - step.astype(jnp.float32)),
            "sam needs radius >= 0 at every step, got -0.5 at step 1",
        ),
        (lambda: pj.rts(scale=lambda step: jnp.nan), "rts needs scale >= 0 at every step, got nan at step 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def test_a_number_that_turns_negative_later_becomes_nan():
    falling = lambda step: 20.0 - jnp.asarray(step, jnp.float32)
    assert float(jax.jit(lambda t: at(falling, Place(t, None, None, None)))(20)) == 0
    assert np.isnan(jax.jit(lambda t: at(falling, Place(t, None, None, None)))(21))
    assert at(0.3, place()) == 0.3
    number = jax.jit(lambda x: at(x, place()))  # as under optax.inject_hyperparams, or in the trainer's step
    np.testing.assert_array_equal(number(0.3), jnp.asarray(0.3, float))
    assert np.isnan(number(-0.3)) and np.isnan(number(jnp.nan)) and float(number(0)) == 0
    assert float(at(lambda step: step, place(2))) == 2  # whole numbers, too


def split(text):
    return spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())


def test_on_the_command_line_timings_are_structure_and_courses_have_numbers():
    """A share as a traced number would be batched when runs are vmapped, and both branches would run."""
    structure, numbers = split("rts(radius=cosine(2), timing=last(0.25))")
    assert structure == split("rts(radius=cosine(first=3), timing=last(0.25))")[0]
    assert structure != split("rts(radius=cosine(2), timing=last(0.5))")[0]
    assert 0.25 not in numbers and 2.0 in numbers
    assert (
        len({split(f"rts(timing={t})")[0] for t in ("always", "never", "every(2)", "every(3)", "after(0.5)", "plateau")}) == 6
    )
    assert split("rts(timing=plateau(threshold=0.5))")[0] == split("rts(timing=plateau)")[0]
    assert split("rts(timing=every(2, start=0.5))")[0] != split("rts(timing=every(2))")[0]


@pytest.mark.parametrize("text", ["sam", "asam", "gsam", "amp", "looksam", "pugd", "rts", "ngd", "rts(scale=linear(0, 1), ascent=gradient)",
                                  "rts(timing=every(3), inactive=unit)", "sam(p=inf)", "gsam(radius=by_rate(0.2, 0.1))",
                                  "pugd(radius=cosine(cycles=3, growth=2))", "amp(norm=global, num_steps=2)", "asam(adaptive=weights)"])  # fmt: skip
def test_every_link_is_built_from_its_name(text):
    [made] = spec.build(*split(text), taxonomy.registry(), taxonomy.helpers())
    assert callable(made.update)


def test_a_misspelt_timing_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"rts needs timing to be always\(...\), never\(...\), .* Write rts\(timing=last"):
        split("rts(timing=lost(0.5))")
    with pytest.raises(ValueError, match="rts needs timing to be .*, got 0.5"):
        split("rts(timing=0.5)")
    with pytest.raises(ValueError, match="rts needs timing to be one of the timings, got 0.5. Write timing=pj.last"):
        pj.rts(timing=0.5)
    with pytest.raises(ValueError, match=r"lpg needs bound to follow the progress, got by_rate\(...\).* Write bound=cosine"):
        split("lpg(bound=by_rate)")


def test_they_are_what_the_annotations_say():
    for helper, kind in [("always", Timing), ("plateau", Timing), ("cosine", Course), ("linear", Course), ("by_rate", Course)]:
        assert isinstance(getattr(pj, helper)(), kind)
