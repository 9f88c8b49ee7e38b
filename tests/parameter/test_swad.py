"""perturbjax.parameter.swad: the window against the algorithm as printed, the mean over its weights against all weights kept."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj
from experiments.shared import parse_methods


def algorithm(losses, converge, patience, tolerance):
    """Algorithm 1 of the paper with evaluations for iterations, as printed: (t_s, t_e), from 0; None: not converged."""
    start, end, threshold = None, len(losses) - 1, None
    for i in range(len(losses)):
        if threshold is None:
            recent = losses[i - converge + 1 : i + 1]
            if i >= converge - 1 and recent[0] == min(recent):
                start, threshold = i - converge + 1, (1 + tolerance) * sum(recent) / converge
        elif i >= patience - 1 and threshold < min(losses[i - patience + 1 : i + 1]):
            end = i - patience
            break
    return start, end


courses = st.lists(st.integers(1, 24).map(lambda n: n / 8), min_size=1, max_size=30)  # whose means are exact


@given(courses, st.integers(1, 4), st.integers(1, 7), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_window_is_the_algorithms(losses, converge, patience, tolerance):
    settings = dict(converge=converge, patience=patience, tolerance=tolerance)
    assert pj.swad_window(losses, **settings) == algorithm(losses, converge, patience, tolerance)


@given(courses, st.integers(1, 4), st.integers(1, 7), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_average_is_over_all_steps_of_the_window_whatever_was_forgotten(losses, converge, patience, tolerance):
    """Intervals of unequal length count by their steps; training ends where the window has."""
    rng = np.random.default_rng(0)
    kept = pj.SWADAverage(converge=converge, patience=patience, tolerance=tolerance)
    weights = []
    for loss in losses:
        own = rng.normal(size=(rng.integers(1, 5), 3))
        weights.append(own)
        if kept.add(loss, {"w": own.mean(0)}, len(own)):
            break
        assert len(kept._pending) <= max(converge, patience)
    first, last = algorithm(losses[: len(weights)], converge, patience, tolerance)
    assert kept.ended == (last < len(weights) - 1)
    assert kept.ended or len(weights) == len(losses)
    inside = weights[last if first is None else first : last + 1]
    np.testing.assert_allclose(kept.average()["w"], np.concatenate(inside).mean(0), rtol=1e-10, atol=1e-12)


def queues(losses, converge, patience, tolerance):
    """The authors' code, whose queues hold intervals k as the weights e_k: (the average, whether the valley is dead)."""
    recent, smooth = collections.deque(maxlen=converge), collections.deque(maxlen=patience)
    weights, start, threshold, dead = np.eye(len(losses)), None, None, False
    average, number = None, 0

    def update(k):
        nonlocal average, number
        average = weights[k] if number == 0 else average + (weights[k] - average) / (number + 1)
        number += 1

    lowest = lambda: min(losses[k] for k in smooth)
    for k in range(len(losses)):
        recent.append(k)
        smooth.append(k)
        if start is None:
            if len(recent) == converge and np.argmin([losses[i] for i in recent]) == 0:
                start, average = recent[0], weights[recent[0]]
                threshold = (1 + tolerance) * np.mean([losses[i] for i in recent])
                if patience < converge:
                    for i in range(converge - patience):
                        update(recent[1 + i])
                elif patience > converge:
                    early, begin = list(smooth)[: patience - converge + 1], 0
                    for i in reversed(range(len(early))):
                        if losses[early[i]] > threshold:
                            begin = i + 1
                            break
                    for i in early[begin + 1 :]:
                        update(i)
        elif smooth[0] >= start:
            dead = lowest() > threshold
            if dead:
                break
            update(smooth[0])
    if start is None:
        return weights[recent[-1]], False
    if not dead:
        smooth.popleft()
        while smooth and lowest() <= threshold:
            update(smooth.popleft())
    return average, dead


@given(courses, st.integers(1, 4), st.integers(1, 7), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_counts_are_those_of_the_authors_queues(losses, converge, patience, tolerance):
    counts, ended = pj.swad_counts(losses, converge=converge, patience=patience, tolerance=tolerance)
    average, dead = queues(losses, converge, patience, tolerance)
    assert ended == dead
    np.testing.assert_allclose(np.array(counts) / sum(counts), average, atol=1e-12)


@given(courses, st.integers(1, 4), st.integers(1, 7), st.sampled_from([0.0, 0.25, 0.5]))
def test_by_the_code_the_average_is_that_of_the_counts_whatever_was_forgotten(losses, converge, patience, tolerance):
    kept = pj.SWADAverage(converge=converge, patience=patience, tolerance=tolerance, rule="code")
    seen = []
    for k, loss in enumerate(losses):
        seen.append(loss)
        if kept.add(loss, {"w": np.eye(len(losses))[k]}, 1 + k % 3):
            break
        assert len(kept._pending) <= max(converge, patience) + 1
    average, dead = queues(losses, converge, patience, tolerance)
    assert kept.ended == dead
    np.testing.assert_allclose(kept.average()["w"], average, atol=1e-12)
    counted = np.flatnonzero(average)
    assert kept.window[1] == counted[-1] and kept.window[0] in (None, counted[0])


def test_by_the_code_the_window_begins_before_the_minimum_and_is_flushed_at_the_end():
    falling, flat = [1.5, 1.4, 1.3, 1.2, 1.0], [1.05, 1.1, 1.05, 1.1, 1.05]
    counts, _ = pj.swad_counts(falling + flat)  # converged at 4; θ = 1.365
    assert counts == [0, 0, 0, 1, 2, 1, 1, 1, 1, 1]  # 3 − 1 above θ: 2 is left out; 4 again at the evaluation 9, then the queue
    counts, _ = pj.swad_counts(
        [1.34, 1.33, 1.32, 1.2, 1.0, 1.05, 1.1]
    )  # N_e − N_s = 3 intervals up to the minimum, then the queue
    assert counts == [0, 0, 2, 2, 2, 1, 1]


def test_the_defaults_are_the_papers():
    falling = [3.0, 2.0, 1.0]
    flat = [1.1, 1.05, 1.3, 1.3]
    assert pj.swad_window(falling + flat) == (2, 6)
    over = falling + flat + [1.4] * 5  # the threshold is 1.3 · 1.05 = 1.365: six evaluations above it are needed
    assert pj.swad_window(over) == (2, 11)
    assert pj.swad_window([*over, 1.4]) == (2, 6)
    assert pj.swad_window([3.0, 2.0, 1.0]) == (None, 2)  # still falling: the last interval


def test_an_interval_is_the_mean_of_the_weights_after_each_of_its_steps():
    """Anywhere in a chain, in every interval anew; the updates are those without it."""
    rng = np.random.default_rng(0)
    gradients = [{"w": jnp.asarray(rng.normal(size=3), jnp.float32)} for _ in range(9)]
    for tx in (optax.chain(pj.swad(), optax.sgd(0.1)), optax.chain(optax.sgd(0.1), pj.swad())):
        traced = []
        update = jax.jit(lambda *given, tx=tx, traced=traced: (traced.append(True), tx.update(*given))[1])
        params, weights, lengths = {"w": jnp.ones(3)}, [], [2, 1, 6]
        state, done = tx.init(params), 0
        plain = np.ones(3)
        for length in lengths:
            for gradient in gradients[done : done + length]:
                updates, state = update(gradient, state, params)
                params = optax.apply_updates(params, updates)
                plain = plain - 0.1 * np.asarray(gradient["w"])
                weights.append(plain)
            done += length
            mean, steps, state = pj.swad_interval(state, params)
            assert steps == length
            np.testing.assert_allclose(mean["w"], np.mean(weights[-length:], axis=0), rtol=1e-5)
        np.testing.assert_allclose(params["w"], plain, rtol=1e-5)
        assert len(traced) == 1


def test_narrow_weights_are_added_in_float32():
    tx = pj.swad()
    params = {"w": jnp.full([2], 1 + 2**-7, jnp.bfloat16)}
    state = tx.init(params)
    for _ in range(301):
        _, state = tx.update(params, state, params)
    mean, steps, _ = pj.swad_interval(state, params)
    assert steps == 301 and mean["w"].dtype == jnp.float32
    np.testing.assert_allclose(mean["w"], 1 + 2**-7, rtol=1e-6)


def test_errors_say_what_was_given():
    tx, params = pj.swad(), {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="swad needs params, got none"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="swad_interval needs a step in the interval, got none"):
        pj.swad_interval(tx.init(params), params)
    with pytest.raises(ValueError, match="swad_interval needs the state of one swad link, got 0"):
        pj.swad_interval(optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="swad_window needs the loss of at least one interval"):
        pj.swad_window([])
    with pytest.raises(ValueError, match="swad_window needs patience >= 1, got 0"):
        pj.swad_window([1.0], patience=0)
    with pytest.raises(ValueError, match="SWADAverage needs rule to be one of its names, got 'codes'. Did you mean 'code'"):
        pj.SWADAverage(rule="codes")


def test_the_command_line_s_swad_says_which_window_is_wanted():
    for typed, rule in (("swad", "paper"), ("swad(rule=code)", "code"), ("swad(code)", "code")):
        [(method, _)] = parse_methods(typed).values()
        assert method.swad_rule == rule
    with pytest.raises(ValueError, match="swad needs rule to be one of its names, got 'papers'"):
        pj.swad(rule="papers")
