"""perturbjax.loss.akd: the point that it finds, the loss there, and that gradients flow where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.feature.adversarial import random_start
from perturbjax.models import create
from perturbjax.training.folder import keep_model
from tests.loss.problem import B, C, D, cross_entropy, linear, log_softmax, onehot, run

T = np.random.default_rng(7).normal(size=(D, C))
TEACHER = pj.Teacher(lambda v, x: jnp.tanh(x @ v), T)
SEARCH = dict(bound=0.3, step_size=0.1, num_steps=4, value_range=None)


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def softmax(u):
    return np.exp(log_softmax(u))


def divergence(x, w, t=1.0):
    """KL(q ‖ p)."""
    z, u = np.tanh(x @ T) / t, x @ w / t
    return (softmax(z) * (log_softmax(z) - log_softmax(u))).sum(1)


def slope(x, w, t):
    """∂KL/∂x by finite differences: the teacher's part as well."""
    steps = 1e-6 * np.eye(x.shape[1])
    return np.stack([(divergence(x + e, w, t) - divergence(x - e, w, t)) / 2e-6 for e in steps], axis=1)


def found(x, w, t=1.0):
    """The search by hand, from the same random start."""
    start = random_start(jax.random.fold_in(jax.random.key(0), 0), jnp.arange(B, dtype=jnp.int32), (D,), bound=0.3, norm="linf")
    delta = np.asarray(start, np.float64)
    for _ in range(4):
        delta = np.clip(delta + 0.1 * np.sign(slope(x + delta, w, t)), -0.3, 0.3)
    return x + delta


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_adds_the_divergence_where_the_two_disagree_most(problem, temperature):
    w, x, y = problem
    out, grad = run(w, x, y, pj.akd(teacher=TEACHER, weight=0.7, temperature=temperature, **SEARCH))
    point = found(x, w, temperature)
    loss = lambda w: cross_entropy(x @ w, onehot(y)) + 0.7 * divergence(point, w, temperature)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-6)
    # With the point held: no gradient flows through the search.
    steps = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)
    numeric = np.array([(loss(w + e) - loss(w - e)).mean() / 2e-6 for e in steps]).reshape(w.shape)
    np.testing.assert_allclose(grad, numeric, atol=1e-6)
    assert out.metrics["akd/inner_evaluations"] == 5


def test_the_search_raises_the_divergence_and_stays_in_the_ball(problem):
    w, x, y = problem
    losses = lambda **s: run(w, x, y, pj.akd(teacher=TEACHER, **SEARCH | s))[0]
    searched, random = (losses(num_steps=n).metrics["akd/divergence"] for n in (4, 0))
    assert searched > random
    closer = losses(bound=0.0)
    np.testing.assert_allclose(closer.losses, cross_entropy(x @ w, onehot(y)) + divergence(x, w), rtol=1e-6)


def test_every_loss_is_raised(problem):
    w, x, y = problem
    assert (run(w, x, y, pj.akd(teacher=TEACHER, **SEARCH))[0].losses > cross_entropy(x @ w, onehot(y))).all()


def test_inputs_keep_to_the_range_of_pixels():
    seen = []

    def teacher(v, x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x @ v

    x = jnp.asarray(np.random.default_rng(0).random((B, D)), jnp.float32)
    teach = pj.Teacher(teacher, np.float32(T))
    links = pj.akd(teacher=teach, bound=0.5, step_size=0.2, num_steps=2)
    run(jnp.zeros([D, C]), x, np.zeros(B, np.int32), links)
    jax.effects_barrier()
    assert len(seen) >= 3 and all((points >= -1e-6).all() and (points <= 1 + 1e-6).all() for points in seen)


def test_errors_say_what_was_given():
    for wrong, message in [
        (dict(weight=-1.0), "akd needs weight >= 0, got -1"),
        (dict(temperature=0.0), "akd needs temperature > 0, got 0"),
        (dict(bound=8.0), "akd needs bound <= 1, got 8: .* Write bound=8/255 if you count in grey levels"),
        (dict(step_size=2.0), "akd needs step_size <= 1, got 2: .* Write step_size=2/255"),
        (dict(norm="l3"), "akd needs norm to be one of its names, got 'l3'"),
        (dict(teacher="nowhere"), "akd needs teacher to be the folder of a run, got 'nowhere'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.akd(**wrong)


def test_a_teacher_of_texts_has_to_take_vectors(tmp_path):
    """The words' vectors are moved, so it never sees tokens: said before training, not from within its trace."""
    model = create("bilstm", num_classes=2, vocabulary_size=7, embedding=3, width=2)
    tokens = jnp.array([[1, 2, 3, 0], [4, 5, 6, 1]], jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    made = lambda teacher: pj.objective(model, pj.akd(teacher=teacher, num_steps=1), num_classes=2)
    init = lambda teacher: made(teacher).init(variables["params"], tokens)

    keep_model(tmp_path, model)
    with pytest.raises(
        ValueError, match=r"akd needs a teacher of the values at 'embedding', .* which reads texts. Write kd\(teacher="
    ):
        init(str(tmp_path))
    reads_tokens = pj.Teacher(lambda v, x: model.apply(v, x), variables)
    with pytest.raises(
        ValueError, match=r"akd needs a teacher for inputs \(2, 4, 3\), got its function, which doesn't take them"
    ):
        init(reads_tokens)

    takes_vectors = pj.Teacher(lambda v, x: model.apply(v, x, start="embedding"), variables)
    for teacher in (takes_vectors, "virtual"):
        loss, _ = made(teacher)(variables["params"], init(teacher), pj.batch(tokens, jnp.array([0, 1])))
        assert np.isfinite(loss)
