"""perturbjax.rounding: whole numbers of samples and steps are those of exact arithmetic, halves included."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbjax as pj
from perturbjax.logit.lpl_steps import class_steps
from perturbjax.rounding import rounded, rounded_down, rounded_up
from perturbjax.split import by_loss_top

few = settings(max_examples=12)  # every size compiles anew
SIZES = np.array([*range(1, 513), 1000, 1024, 4096, 8192, 50_000])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("parts", [100, 1000, 7])
def test_shares_of_numbers_are_rounded_as_fractions(parts, x64):
    """Every share k/parts of every size, halves to the even number as Python's round has them."""
    with jax.enable_x64(x64):
        shares = jnp.asarray(np.arange(parts + 1) / parts, float)
        products = shares[:, None] * jnp.asarray(SIZES, shares.dtype)[None]
        found = [np.asarray(f(products)) for f in (rounded, rounded_down, rounded_up)]
    exact = [[Fraction(k, parts) * int(n) for n in SIZES] for k in range(parts + 1)]
    for ours, f in zip(found, (round, math.floor, math.ceil), strict=True):
        np.testing.assert_array_equal(ours, [[f(x) for x in row] for row in exact])


@few
@given(st.integers(1, 400), st.integers(0, 100))
def test_as_many_samples_are_hard_as_exact_arithmetic_says(size, percent):
    losses = jnp.asarray(np.random.default_rng(0).permutation(size), jnp.float32)
    expected = round(Fraction(percent * size, 100))
    assert int(pj.hard_samples(losses, pro=float(percent))[0].sum()) == expected
    assert int((by_loss_top(losses, share=jnp.float32(percent / 100)) < 0).sum()) == expected


@pytest.mark.parametrize("size, hard", [(190, 28), (350, 52), (390, 58)])
def test_fifteen_percent_of_some_batches_are_a_half(size, hard):
    assert int(pj.hard_samples(jnp.arange(size, dtype=jnp.float32), pro=15.0)[0].sum()) == hard


counts = st.lists(st.integers(1, 5000), min_size=2, max_size=8)


@few
@given(counts, st.integers(1, 100), st.integers(0, 20))
def test_head_and_tail_steps_are_those_of_fractions(counts, most, twentieths):
    """head: round(S·f·N_c/N_1 − 1) + 1, tail: round(S·N_C/N_c − 1) + 1, no place below 0."""
    context = pj.Context(len(counts), jnp.asarray(counts))
    for direction, rule in (
        (-1.0, lambda n: Fraction(twentieths, 20) * most * n / max(counts)),
        (1.0, lambda n: Fraction(most * min(counts), n)),
    ):
        rules = pj.head_tail_steps(most=most, head=twentieths / 20)
        found = class_steps(rules, split=pj.all_classes(direction=direction), state=(), context=context)
        np.testing.assert_array_equal(found, [max(round(rule(n) - 1), 0) + 1 for n in counts])


def test_the_example_of_a_half():
    rules = pj.head_tail_steps(most=100.0, head=1.0)
    context = pj.Context(3, jnp.array([100, 40, 21]))
    found = class_steps(rules, split=pj.by_frequency(tau=1 / 3), state=(), context=context)
    np.testing.assert_array_equal(found, [100, 53, 100])


@few
@given(st.integers(2, 60), st.integers(0, 100))
def test_the_head_of_a_split_is_a_share_of_the_classes(classes, percent):
    context = pj.Context(classes, jnp.arange(classes, 0, -1))
    signs = pj.by_frequency(tau=percent / 100).direction((), context)
    assert int((signs < 0).sum()) == math.floor(Fraction(percent * classes, 100))


@few
@given(st.integers(1, 200), st.integers(0, 100))
def test_the_quantile_of_the_losses_is_the_one_that_a_share_does_not_exceed(size, percent):
    losses = jnp.arange(1, size + 1, dtype=jnp.float32)
    assert int(pj.loss_quantile(losses, percent / 100)) == max(math.ceil(Fraction(percent * size, 100)), 1)


@few
@given(st.integers(1, 200), st.integers(1, 100))
def test_the_top_share_is_at_or_above_the_percentile(size, percent):
    marked = pj.top_share(jnp.arange(size, dtype=jnp.float32), share=percent / 100)
    assert int(marked.sum()) == math.floor(Fraction(percent * (size - 1), 100)) + 1
