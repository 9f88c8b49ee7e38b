"""perturbjax.logit.large_margin: ψ against angles, monotone and continuous; the loss and its gradient; the annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, D, B = 4, 3, 9
MODEL = pj.line(
    {"features": lambda w, x: x @ w["a"], "logits": lambda w, a: a @ w["w"].T + w["b"][None]}, head=lambda w: (w["w"], w["b"])
)


@pytest.fixture
def problem():
    """Parameters, inputs and labels in float64."""
    rng = np.random.default_rng(0)
    params = dict(a=rng.normal(size=(5, D)), w=rng.normal(size=(C, D)), b=rng.normal(size=C))
    with jax.enable_x64(True):
        yield params, rng.normal(size=(B, 5)), rng.integers(0, C, B).astype(np.int32)


def psi(theta, m):
    """By its pieces."""
    k = np.minimum(np.floor(theta * m / np.pi), m - 1)
    return (-1) ** k * np.cos(m * theta) - 2 * k


def losses(params, x, y, m, anneal):
    """The loss with the annealed ψ, and the bias of the model on all logits."""
    a, rows = x @ params["a"], params["w"][y]
    u = a @ params["w"].T + params["b"]
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(rows, axis=1)
    theta = np.arccos((a * rows).sum(1) / length)
    u[np.arange(len(y)), y] = params["b"][y] + length * (anneal * np.cos(theta) + psi(theta, m)) / (1 + anneal)
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


def run(params, x, y, links, **options):
    made = pj.objective(MODEL, links, num_classes=C)
    states = made.init(params, x)
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(params, states, pj.batch(x, jnp.asarray(y)), **options)
    return out, grad


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
def test_psi_is_that_of_the_angle_and_falls_without_a_jump(m):
    theta = np.linspace(0, np.pi, 5001)
    with jax.enable_x64(True):
        found = np.asarray(pj.angle_margin(jnp.cos(theta), margin=m))
    np.testing.assert_allclose(found, psi(theta, m), atol=1e-9)
    assert (np.diff(found) <= 1e-9).all() and np.abs(np.diff(found)).max() < 0.01 * m
    assert (found <= np.cos(theta) + 1e-9).all()


@pytest.mark.parametrize("m, progress, anneal", [(2, 0.5, 5.0), (4, 1.0, 5.0), (4, 0.25, np.sqrt(5000.0)), (3, 0.0, 1000.0)])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, m, progress, anneal):
    """The gradient flows through the angle, into features and rows."""
    params, x, y = problem
    out, grad = run(params, x, y, pj.large_margin(margin=m), progress=progress)
    np.testing.assert_allclose(out.losses, losses(params, x, y, m, anneal), rtol=1e-5)  # λ is a float32
    for name, value in params.items():
        steps = 1e-6 * np.eye(value.size).reshape(-1, *value.shape)
        at = lambda v, name=name: losses({**params, name: v}, x, y, m, anneal).mean()
        numeric = np.array([(at(value + e) - at(value - e)) / 2e-6 for e in steps]).reshape(value.shape)
        np.testing.assert_allclose(grad[name], numeric, rtol=1e-4, atol=1e-6)


def test_margin_one_is_plain_softmax(problem):
    params, x, y = problem
    ours, plain = run(params, x, y, pj.large_margin(margin=1)), run(params, x, y, ())
    jax.tree.map(np.testing.assert_array_equal, (ours[0].losses, ours[1]), (plain[0].losses, plain[1]))
    shift = pj.large_margin_shift(jnp.asarray(x[:, :D]), jnp.asarray(params["w"]), jnp.asarray(y), margin=1)
    np.testing.assert_array_equal(shift, 0.0)


def test_every_loss_is_raised_more_so_with_less_annealing(problem):
    params, x, y = problem
    plain = np.asarray(run(params, x, y, ())[0].losses)
    late, early = (np.asarray(run(params, x, y, pj.large_margin(), progress=t)[0].losses) for t in (0.9, 0.2))
    assert (plain < early).all() and (early < late).all()


def test_only_the_true_class_s_logit_moves(problem):
    params, x, y = problem
    moved = np.asarray(run(params, x, y, pj.large_margin(), progress=1.0)[0].logits - run(params, x, y, ())[0].logits)
    true = np.eye(C, dtype=bool)[y]
    assert (moved[true] < 0).all() and (moved[~true] == 0).all()


def test_zero_features_and_padding_move_nothing_and_have_finite_gradients():
    features, rows, labels = jnp.array([[0.0, 0.0], [1.0, 2.0], [1.0, 0.0]]), jnp.eye(2), jnp.array([0, -1, 0])
    shift = lambda a: pj.large_margin_shift(a, rows, labels, margin=4)
    np.testing.assert_array_equal(shift(features)[:2], 0.0)
    assert np.isfinite(jax.grad(lambda a: shift(a).sum())(features)).all()


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="large_margin needs margin >= 1, got 0"):
        pj.large_margin(margin=0)
    with pytest.raises(ValueError, match="large_margin needs last > 0, got 0"):
        pj.large_margin(last=0.0)
    with pytest.raises(ValueError, match="large_margin needs 'features', got none"):
        pj.objective(lambda w, x: x @ w, pj.large_margin(), num_classes=C)
    maps = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w}, head=lambda w: (w.T, 0))
    with pytest.raises(ValueError, match=r"large_margin needs features \[B, d\], got \(2, 3, 3, 4\)"):
        pj.objective(maps, pj.large_margin(), num_classes=C).init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
