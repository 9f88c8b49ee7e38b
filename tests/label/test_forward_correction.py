"""perturbjax.label.forward_correction: Tᵀp, the named matrices, T estimated over epochs, T learned, and what T must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import B, C, batches, numeric_gradient, run, softmax, weights

T = np.array([[0.7, 0.1, 0.1, 0.1], [0.0, 0.8, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0], [0.25, 0.25, 0.25, 0.25]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def corrected(u, y, transition):
    return -np.log((softmax(u) @ transition)[np.arange(len(y)), y])


def test_given_matrix_in_losses_and_gradient():
    (x, y, _), w = next(batches(1)), weights()
    out, grad = run(w, x, y, pj.forward_correction(matrix=T))
    np.testing.assert_allclose(out.losses, corrected(x @ w, y, T), rtol=1e-9)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: corrected(x @ w, y, T).mean(), w), atol=1e-8)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_named_noise(kind):
    (x, y, _), w = next(batches(1)), weights()
    out, _ = run(w, x, y, pj.forward_correction(transition=kind, rate=0.3))
    other = np.full((C, C), 1 / C) if kind == "symmetric" else np.eye(C)[:, [3, 0, 1, 2]]
    np.testing.assert_allclose(pj.noise_matrix(kind, C, 0.3), 0.7 * np.eye(C) + 0.3 * other, atol=1e-12)
    np.testing.assert_allclose(out.losses, corrected(x @ w, y, 0.7 * np.eye(C) + 0.3 * other), rtol=1e-9)
    zero, _ = run(w, x, y, pj.forward_correction(transition=kind, rate=0.0))
    np.testing.assert_allclose(zero.losses, run(w, x, y, ())[0].losses, rtol=1e-12)


def test_symmetric_noise_is_label_smoothing_of_the_prediction():
    (x, y, _), w = next(batches(1)), weights()
    ours, grad = run(w, x, y, pj.forward_correction(transition="symmetric", rate=0.3))
    theirs, other = run(w, x, y, pj.label_smoothing(weight=0.3, on="prediction"))
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-9)
    np.testing.assert_allclose(grad, other, atol=1e-10)


def test_with_the_right_matrix_noisy_labels_have_the_same_minimiser():
    """Patrini et al., Theorem 2: on average over noisy labels the loss is lowest at the clean posterior."""
    clean = np.random.default_rng(0).dirichlet(np.ones(C), 50)
    noisy = clean @ T
    risk = lambda p: -(noisy * np.asarray(pj.forward_corrected(jnp.log(p), jnp.asarray(T)))).sum(1)
    for other in np.random.default_rng(1).dirichlet(np.ones(C), 100):
        assert (risk(jnp.asarray(clean)) <= risk(jnp.broadcast_to(jnp.asarray(other), (50, C))) + 1e-9).all()


def test_estimate_is_the_prediction_at_the_surest_samples_of_the_last_plain_epoch():
    """Two batches an epoch, plain until 0.4 of five epochs: T from epoch 1, whole, in use from epoch 2 on and never changed."""
    link, states, w = pj.forward_correction(start=0.4), None, weights()
    data = list(batches(10))
    for step, (x, y, _) in enumerate(data):
        out, grad = run(w, x, y, link, states=states, step=dict(epoch=step // 2, progress=step / 10))
        states = out.states
        if step < 4:
            np.testing.assert_allclose(out.losses, run(w, x, y, ())[0].losses, rtol=1e-12)
            continue
        p = softmax(np.concatenate([data[2][0], data[3][0]]) @ w)
        expected = p[p.argmax(0)]
        np.testing.assert_allclose(states[0].transition, expected, rtol=1e-6)
        np.testing.assert_allclose(out.losses, corrected(x @ w, y, expected), rtol=1e-6)
        np.testing.assert_allclose(grad, numeric_gradient(lambda w: corrected(x @ w, y, expected).mean(), w), atol=1e-6)


def test_an_epoch_that_the_warm_up_ends_in_does_not_count():
    link, states, w = pj.forward_correction(start=0.5), None, weights()
    data = list(batches(6))
    for step, (x, y, _) in enumerate(data):  # epochs 0 and 1 of three batches; plain for three steps and no more
        out, _ = run(w, x, y, link, states=states, step=dict(epoch=step // 3, progress=step / 6 + (step == 3) * 0.01))
        states = out.states
    p = softmax(np.concatenate([x for x, _, _ in data[:3]]) @ w)
    np.testing.assert_allclose(states[0].transition, p[p.argmax(0)], rtol=1e-6)
    early = pj.forward_correction(start=0.1)  # over before the first epoch is: the identity
    states = None
    for step, (x, y, _) in enumerate(data):
        out, _ = run(w, x, y, early, states=states, step=dict(epoch=step // 3, progress=step / 6))
        states = out.states
    np.testing.assert_array_equal(states[0].transition, np.eye(C))


def test_learned_matrix_descends_the_loss():
    (x, y, _), w = next(batches(1)), weights()
    link = pj.forward_correction(transition="learned", rate=0.2, step_size=0.5)
    first, _ = run(w, x, y, link)
    theta = np.log(np.asarray(pj.noise_matrix("symmetric", C, 0.2)))
    np.testing.assert_allclose(first.losses, corrected(x @ w, y, softmax(theta)), rtol=1e-9)
    slope = numeric_gradient(lambda theta: corrected(x @ w, y, softmax(theta)).mean(), theta)
    np.testing.assert_allclose(first.states[0].theta, theta - 0.5 * slope, atol=1e-8)
    second, _ = run(w, x, y, link, states=first.states)
    assert second.losses.mean() < first.losses.mean()


def test_learned_matrix_finds_the_noise():
    """A net that knows the clean classes, labels with pair noise 0.3: T comes close to how the classes are labelled."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, C, 512)
    y = np.where(rng.uniform(size=512) < 0.3, (true + 1) % C, true)
    u = jnp.asarray(8 * np.eye(C)[true])
    made = pj.objective(lambda w, x: x, pj.forward_correction(transition="learned", step_size=2.0), num_classes=C)
    states, step = made.init(jnp.zeros(()), u), jax.jit(lambda s: made(jnp.zeros(()), s, pj.batch(u, jnp.asarray(y)))[1].states)
    for _ in range(300):
        states = step(states)
    confusion = np.array([[(y[true == i] == j).mean() for j in range(C)] for i in range(C)])
    np.testing.assert_allclose(jax.nn.softmax(states[0].theta), confusion, atol=0.02)


def test_certain_predictions_stay_finite():
    log_p = jax.nn.log_softmax(jnp.array([[1e3, 0.0, 0.0, 0.0]]))
    hard = jnp.asarray(np.eye(C))
    value, slope = jax.value_and_grad(lambda u: pj.forward_corrected(jax.nn.log_softmax(u), hard)[0, 1])(1e3 * hard[:1])
    assert np.isfinite(value) and np.isfinite(slope).all() and np.isfinite(pj.forward_corrected(log_p, hard)).all()


def test_what_the_matrix_must_be():
    with pytest.raises(ValueError, match=r"forward_correction needs matrix .* got rows that sum to \[1.0, 1.2\]"):
        pj.forward_correction(matrix=[[0.5, 0.5], [0.7, 0.5]])
    with pytest.raises(ValueError, match="got the entry -0.5"):
        pj.forward_correction(matrix=[[1.5, -0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"got shape \(1, 2\)"):
        pj.forward_correction(matrix=[[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"forward_correction needs matrix \[4, 4\], got \(2, 2\)"):
        run(weights(), np.zeros((B, 5)), np.zeros(B, np.int32), pj.forward_correction(matrix=np.eye(2)))
    with pytest.raises(ValueError, match="forward_correction needs transition to be one of its names, got 'pairs'"):
        pj.forward_correction(transition="pairs")
    with pytest.raises(ValueError, match="forward_correction needs rate > 0, got 0"):
        pj.forward_correction(transition="learned", rate=0)
