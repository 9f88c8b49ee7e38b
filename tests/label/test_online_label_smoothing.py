"""perturbjax.label.online_label_smoothing: the class means of right predictions, swapped at the epoch's end, and what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, losses, numeric_gradient, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_three_epochs_in_numpy():
    """½ CE(p, y) + ½ CE(p, S_y), S the mean p of the right ones of the epoch before; a class without any keeps what it had."""
    link, states, w = pj.online_label_smoothing(), None, 2 * weights()
    soft, known = np.zeros((C, C)), np.zeros(C, bool)
    total, count = np.zeros((C, C)), np.zeros(C)
    for step, (x, y, _) in enumerate(batches(9)):
        if step % 3 == 0:
            hit = count > 0
            soft[hit], known = total[hit] / count[hit, None], known | hit
            total, count = np.zeros((C, C)), np.zeros(C)
        u = x @ w
        out, _ = run(w, x, y, link, states=states, step=dict(epoch=step // 3))
        states, p, onehot = out.states, softmax(u), np.eye(C)[y]
        targets = np.where(known[y][:, None], 0.5 * onehot + 0.5 * soft[y], onehot)
        np.testing.assert_allclose(out.losses, losses(u, targets), rtol=1e-12)
        for i in np.flatnonzero(p.argmax(1) == y):
            total[y[i]] += p[i]
            count[y[i]] += 1
    assert known.all() and 0 < count.sum() < 24


def test_by_the_code_soft_labels_begin_as_zeros_and_are_uniform_for_a_class_without_a_hit():
    """The authors' code in numpy over four epochs: a matrix of zeros, then means of the last epoch's right predictions, or 1/C."""
    link, states, w = pj.online_label_smoothing(missing="code", weight=0.5), None, weights()
    soft, total, count, uniform = np.zeros((C, C)), np.zeros((C, C)), np.zeros(C), 0
    for step, (x, y, _) in enumerate(batches(8)):
        if step % 2 == 0 and step:
            soft = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], 1 / C)
            uniform += (count == 0).sum()
            total, count = np.zeros((C, C)), np.zeros(C)
        u = x @ w
        out, grad = run(w, x, y, link, states=states, step=dict(epoch=step // 2))
        before = jax.tree.map(lambda a: (a.shape, a.dtype), states or out.states)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), out.states) == before
        states, p, targets = out.states, softmax(u), 0.5 * np.eye(C)[y] + 0.5 * soft[y]
        np.testing.assert_allclose(out.losses, losses(u, targets), rtol=1e-12)
        np.testing.assert_allclose(grad, numeric_gradient(lambda w, x=x, t=targets: losses(x @ w, t).mean(), w), atol=1e-8)
        if step < 2:
            np.testing.assert_allclose(out.losses, 0.5 * losses(u, np.eye(C)[y]), rtol=1e-12)
        for i in np.flatnonzero(p.argmax(1) == y):
            total[y[i]] += p[i]
            count[y[i]] += 1
    assert 0 < uniform < 3 * C


def test_gradient_is_the_finite_difference_with_the_matrix_held():
    link, w = pj.online_label_smoothing(weight=0.7), weights()
    (x, y, _), (x2, y2, _) = batches(2)
    out, _ = run(w, x, y, link, step=dict(epoch=0))
    _, grad = run(w, x2, y2, link, states=out.states, step=dict(epoch=1))
    p, right = softmax(x @ w), (x @ w).argmax(1) == y
    soft = np.array([p[right & (y == c)].mean(0) if (right & (y == c)).any() else np.eye(C)[c] for c in range(C)])
    targets = 0.3 * np.eye(C)[y2] + 0.7 * soft[y2]
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: losses(x2 @ w, targets).mean(), w), atol=1e-6)


def test_the_first_epoch_is_plain():
    (x, y, _), w = next(batches(1)), weights()
    out, _ = run(w, x, y, pj.online_label_smoothing(), step=dict(epoch=0))
    np.testing.assert_array_equal(out.losses, run(w, x, y, ())[0].losses)


def test_it_is_mix_bootstrapping_with_beta_one():
    """The paper's remark on eq. 67."""
    w, found = 2 * weights(), []
    for link in (pj.online_label_smoothing(weight=0.4), pj.mix_bootstrapping(weight=0.4, beta=1.0, confidence="right")):
        states = None
        for step, (x, y, _) in enumerate(batches(4)):
            out, _ = run(w, x, y, link, states=states, step=dict(epoch=step // 2))
            states = out.states
        found.append(out.losses)
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_bare_function_and_errors():
    soft, known = jnp.array([[0.8, 0.2], [0.3, 0.7]]), jnp.array([True, True])
    after = pj.smoothed_online(jnp.eye(2), jnp.array([0, 1]), soft, known, weight=1.0)
    np.testing.assert_allclose(after, soft)
    with pytest.raises(ValueError, match="online_label_smoothing needs 0 <= weight <= 1, got 2"):
        pj.online_label_smoothing(weight=2)
    with pytest.raises(ValueError, match="online_label_smoothing needs missing to be one of its names, got 'zeros'"):
        pj.online_label_smoothing(missing="zeros")
