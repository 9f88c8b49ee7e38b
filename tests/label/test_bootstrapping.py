"""perturbjax.label.bootstrapping: both kinds, what a perturbation of the target must keep (eq. 7), and the stopped gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj
from tests.loss.problem import MODEL, C, cross_entropy, difference, linear, log_softmax, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def moved(targets, u, weight, kind):
    """y + λ(y′ − y) (taxonomy eqs. 37–38)."""
    own = np.exp(log_softmax(u)) if kind == "soft" else np.eye(C)[u.argmax(1)]
    return (1 - weight) * targets + weight * own


@pytest.mark.parametrize(
    "kind, weight, used", [("soft", 0.3, 0.3), ("hard", 0.3, 0.3), ("soft", None, 0.05), ("hard", None, 0.2)]
)
def test_losses_are_those_of_the_moved_targets(problem, kind, weight, used):
    w, x, y = problem
    out, _ = run(w, x, y, pj.bootstrapping(kind=kind, weight=weight))
    targets = moved(np.eye(C)[y], x @ w, used, kind)
    np.testing.assert_allclose(out.losses, cross_entropy(x @ w, targets), rtol=1e-9)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_gradient_is_the_finite_difference_with_the_targets_held(problem, kind):
    w, x, y = problem
    _, grad = run(w, x, y, pj.bootstrapping(kind=kind, weight=0.3))
    held = moved(np.eye(C)[y], x @ w, 0.3, kind)
    np.testing.assert_allclose(grad, difference(lambda w: cross_entropy(x @ w, held).mean(), w), atol=1e-9)
    if kind == "soft":  # letting the gradient into the target is another method
        through = lambda w: cross_entropy(x @ w, moved(np.eye(C)[y], x @ w, 0.3, kind)).mean()
        assert np.abs(grad - difference(through, w)).max() > 1e-3


def test_through_lets_the_gradient_into_the_soft_target(problem):
    w, x, y = problem
    out, grad = run(w, x, y, pj.bootstrapping(weight=0.3, through=True))
    loss = lambda w: cross_entropy(x @ w, moved(np.eye(C)[y], x @ w, 0.3, "soft"))
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-12)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-9)
    assert np.abs(grad - run(w, x, y, pj.bootstrapping(weight=0.3))[1]).max() > 1e-3
    off = run(w, x, y, pj.bootstrapping(weight=0.0, through=True))[1]
    np.testing.assert_allclose(off, run(w, x, y, ())[1], rtol=1e-12, atol=1e-15)


logits = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=C, max_size=C), min_size=3, max_size=3)


@given(logits, logits, st.floats(0, 1, width=32), st.sampled_from(["soft", "hard"]))
def test_targets_stay_on_the_simplex(u, v, weight, kind):
    """Eq. 7: Σ_c Δy_c = 0 and y + Δy ≥ 0, for any soft target."""
    softmax = lambda x: jax.nn.softmax(jnp.array(x, jnp.float32))
    targets = softmax(v)
    after = pj.bootstrapped_targets(targets, jax.nn.log_softmax(jnp.array(u, jnp.float32)), weight=weight, kind=kind)
    np.testing.assert_allclose((after - targets).sum(1), 0, atol=2e-6)
    assert (after >= 0).all()


def test_hard_bootstrapping_lowers_every_loss_soft_need_not(problem):
    w, x, y = problem
    plain, _ = run(w, x, y, ())
    hard, _ = run(w, x, y, pj.bootstrapping(kind="hard"))
    assert (hard.losses <= plain.losses + 1e-12).all() and (hard.losses < plain.losses - 1e-3).any()
    u = np.array([[3.0, 0, 0, 0]])  # the taxonomy paper's remark after eq. 38 holds for the hard prediction only
    out, _ = run(np.eye(C), u, np.array([0]), pj.bootstrapping(weight=0.9))
    assert out.losses[0] > run(np.eye(C), u, np.array([0]), ())[0].losses[0] + 0.1


def test_mixed_targets_are_moved_as_they_are(problem):
    w, x, y = problem
    targets = 0.6 * np.eye(C)[y] + 0.4 * np.eye(C)[y[::-1]]
    out, _ = run(w, x, y, pj.bootstrapping(weight=0.3), targets=jnp.asarray(targets))
    np.testing.assert_allclose(out.losses, cross_entropy(x @ w, moved(targets, x @ w, 0.3, "soft")), rtol=1e-9)


def test_the_prediction_is_that_of_the_perturbed_logits(problem):
    """After LA the own prediction is the adjusted one: what the loss sees."""
    w, x, y = problem
    counts = np.array([50, 20, 10, 5])
    out, _ = run(w, x, y, pj.chain(pj.logit_adjustment(), pj.bootstrapping(weight=0.3)), settings=dict(class_counts=counts))
    u = x @ w + np.log(counts / counts.sum())
    np.testing.assert_allclose(out.losses, cross_entropy(u, moved(np.eye(C)[y], u, 0.3, "soft")), rtol=1e-9)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="bootstrapping needs kind to be one of its names, got 'firm'"):
        pj.bootstrapping(kind="firm")
    with pytest.raises(ValueError, match="bootstrapping needs 0 <= weight <= 1, got -0.1"):
        pj.bootstrapping(weight=-0.1)
    for settings, given_as in ((dict(kind="hard"), "kind='hard'"), (dict(previous=True), "previous=True")):
        with pytest.raises(ValueError, match=f"needs the current soft prediction for through=True, got {given_as}. Leave"):
            pj.bootstrapping(through=True, **settings)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_previous_predictions_are_those_of_the_samples_last_visit(problem, kind):
    """Taxonomy eq. 37: y′ from the previous epoch, by the sample's position in the data set; y itself at the first visit."""
    w, _, _ = problem
    rng, made = np.random.default_rng(2), None
    made = pj.objective(MODEL, pj.bootstrapping(kind=kind, weight=0.4, previous=True), num_classes=C, num_examples=12)
    states, remembered = made.init(w, np.zeros((7, 5))), {}
    for _ in range(4):
        index, x, y = rng.permutation(12)[:7].astype(np.int32), rng.normal(size=(7, 5)), rng.integers(0, C, 7).astype(np.int32)
        u, targets = x @ w, np.eye(C)[y]
        for i, position in enumerate(index):
            if position in remembered:
                targets[i] = moved(targets[i : i + 1], remembered[position][None], 0.4, kind)[0]
            remembered[position] = u[i]
        (_, out), grad = jax.value_and_grad(made, has_aux=True)(
            w, states, pj.batch(x, jnp.asarray(y), index=jnp.asarray(index))
        )
        states = out.states
        np.testing.assert_allclose(out.losses, cross_entropy(u, targets), rtol=1e-9)
        np.testing.assert_allclose(grad, x.T @ (np.exp(log_softmax(u)) - targets) / 7, atol=1e-10)
        w = w - 0.1 * np.asarray(grad)


def test_previous_predictions_need_a_table(problem):
    w, x, y = problem
    with pytest.raises(ValueError, match="bootstrapping needs num_examples for previous=True, got none"):
        run(w, x, y, pj.bootstrapping(previous=True))
    made = pj.objective(MODEL, pj.bootstrapping(previous=True), num_classes=C, num_examples=5)
    with pytest.raises(ValueError, match=r"bootstrapping needs indices in 0\.\.4, got 5 at position 5"):
        made(w, made.init(w, x), pj.batch(x, jnp.asarray(y), index=jnp.arange(len(y))))
