"""perturbjax.label.mix_bootstrapping: eqs. 67–69 in numpy, and soft bootstrapping as its limit."""

import jax
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, losses, numeric_gradient, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("confidence", ["one", "right"])
def test_two_epochs_in_numpy(confidence):
    link, states, w = pj.mix_bootstrapping(weight=0.6, beta=0.3, confidence=confidence), None, weights()
    first, second = (list(batches(2, seed)) for seed in (0, 5))
    for x, y, _ in first:
        out, _ = run(w, x, y, link, states=states, step=dict(epoch=0))
        states = out.states
        p, onehot = softmax(x @ w), np.eye(C)[y]
        targets = onehot + 0.6 * (0.3 * onehot + 0.7 * p - onehot)  # no epoch before: the class part keeps y
        np.testing.assert_allclose(out.losses, losses(x @ w, targets), rtol=1e-6)
    every_p = np.concatenate([softmax(x @ w) for x, _, _ in first])
    every_y = np.concatenate([y for _, y, _ in first])
    conf = np.ones(len(every_y)) if confidence == "one" else (every_p.argmax(1) == every_y).astype(float)
    mean = np.eye(C)
    for c in range(C):
        if (conf * (every_y == c)).sum():
            mean[c] = (conf * (every_y == c)) @ every_p / (conf * (every_y == c)).sum()
    x, y, _ = second[0]
    out, grad = run(w, x, y, link, states=states, step=dict(epoch=1))
    onehot = np.eye(C)[y]
    targets = onehot + 0.6 * (0.3 * mean[y] + 0.7 * softmax(x @ w) - onehot)
    np.testing.assert_allclose(out.losses, losses(x @ w, targets), rtol=1e-5)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: losses(x @ w, targets).mean(), w), atol=1e-6)


def test_beta_zero_is_soft_bootstrapping():
    (x, y, _), w = next(batches(1)), weights()
    ours, grad = run(w, x, y, pj.mix_bootstrapping(weight=0.3, beta=0.0), step=dict(epoch=0))
    theirs, other = run(w, x, y, pj.bootstrapping(weight=0.3))
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-12)
    np.testing.assert_allclose(grad, other, rtol=1e-10)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="mix_bootstrapping needs 0 <= beta <= 1, got 1.5"):
        pj.mix_bootstrapping(beta=1.5)
    with pytest.raises(ValueError, match="mix_bootstrapping needs confidence to be one of its names, got 'all'"):
        pj.mix_bootstrapping(confidence="all")
