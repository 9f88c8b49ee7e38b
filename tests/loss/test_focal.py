"""perturbjax.loss.focal: the equation, its gradient (also where p = 1), its limits, and company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import MODEL, C, difference, linear, log_softmax, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def focal_loss(u, y, gamma, targets=None):
    """(1 − p_y)^γ · ℓ, ℓ the cross entropy with the targets."""
    log_p, targets = log_softmax(u), np.eye(C)[y] if targets is None else targets
    return (1 - np.exp(log_p[np.arange(len(y)), y])) ** gamma * -(targets * log_p).sum(1)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, gamma):
    """The factor takes part in the gradient."""
    w, x, y = problem
    out, grad = run(w, x, y, pj.focal(gamma=gamma))
    np.testing.assert_allclose(out.losses, focal_loss(x @ w, y, gamma), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: focal_loss(x @ w, y, gamma).mean(), w), atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 10.0, 17.0, 100.0, 1e4])
def test_value_and_gradients_stay_finite_up_to_certainty(gamma, gap):
    """In float32 the probability of the true class is exactly 1 from a logit gap of 17 on."""

    def loss(u, gamma):
        log_p = jax.nn.log_softmax(u)
        return (pj.focal_factor(log_p, jnp.array([0]), gamma=gamma) * -log_p[:, 0]).sum()

    for out in jax.value_and_grad(loss, argnums=(0, 1))(jnp.array([[gap, 0.0]]), jnp.float32(gamma)):
        for leaf in jax.tree.leaves(out):
            assert np.isfinite(leaf).all()


def test_gamma_zero_is_cross_entropy(problem):
    w, x, y = problem
    for ours, plain in zip(run(w, x, y, pj.focal(gamma=0.0)), run(w, x, y, ())):
        ours, plain = (getattr(o, "losses", o) for o in (ours, plain))
        np.testing.assert_array_equal(ours, plain)


def test_small_misses_keep_their_digits():
    """1 − p for p = 1 − 1.1e-6: the difference of two float32 numbers would be off by up to 5 %."""
    log_p = jnp.log1p(-jnp.float32(1.1e-6)).reshape(1, 1)
    np.testing.assert_allclose(pj.focal_factor(log_p, jnp.array([0]), gamma=1.0), [1.1e-6], rtol=1e-5)


def test_after_label_smoothing_it_multiplies_that_loss_by_the_label_s_factor(problem):
    w, x, y = problem
    out, _ = run(w, x, y, pj.chain(pj.focal(gamma=2.0), pj.label_smoothing(weight=0.2)))
    np.testing.assert_allclose(out.losses, focal_loss(x @ w, y, 2.0, 0.8 * np.eye(C)[y] + 0.05), rtol=1e-10)


def test_with_mixed_targets_the_factor_is_that_of_the_dominant_class(problem):
    w, x, y = problem
    targets = 0.7 * np.eye(C)[y] + 0.3 * np.eye(C)[y[::-1]]
    out, _ = run(w, x, y, pj.focal(), targets=jnp.asarray(targets))
    np.testing.assert_allclose(out.losses, focal_loss(x @ w, y, 2.0, targets), rtol=1e-10)


def test_it_lowers_every_loss(problem):
    w, x, y = problem
    assert (run(w, x, y, pj.focal())[0].losses < run(w, x, y, ())[0].losses).all()


def test_by_category_the_factor_is_that_of_the_class_s_mean_and_a_constant(problem):
    """(1 − mean of p_y over the class)^γ (taxonomy, footnote 4)."""
    w, x, y = problem
    out, grad = run(w, x, y, pj.focal(gamma=2.0, granularity="category"))
    p = np.exp(log_softmax(x @ w))[np.arange(len(y)), y]
    factor = np.array([(1 - p[y == c].mean()) ** 2 for c in y])
    ce = lambda w: -log_softmax(x @ w)[np.arange(len(y)), y]
    np.testing.assert_allclose(out.losses, factor * ce(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: (factor * ce(w)).mean(), w), atol=1e-9)


def test_by_category_of_one_sample_each_it_is_by_sample(problem):
    w, x, _ = problem
    alone = [run(w, x[:C], np.arange(C), pj.focal(granularity=g))[0].losses for g in ("category", "sample")]
    np.testing.assert_allclose(*alone, rtol=1e-12)
    off = run(w, x, np.zeros(7, int), pj.focal(gamma=0.0, granularity="category"))[0].losses
    np.testing.assert_array_equal(off, run(w, x, np.zeros(7, int), ())[0].losses)


def test_by_category_four_devices_are_one(problem):
    _, x, _ = problem
    rng = np.random.default_rng(1)
    w, x, y = (jnp.asarray(v) for v in (rng.normal(size=(5, C)), rng.normal(size=(16, 5)), rng.integers(0, C, 16)))

    def losses(w, x, y, axis_name=None):
        made = pj.objective(MODEL, pj.focal(granularity="category"), num_classes=C, axis_name=axis_name)
        return made(w, ((),), pj.batch(x, y))[1].losses

    P, mesh = jax.sharding.PartitionSpec, jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda w, x, y: losses(w, x, y, "d"), mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d"), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(mapped)(w, x, y), losses(w, x, y), rtol=1e-9)


def sigmoid_focal(u, y, gamma):
    """Σ_c (1 − q)^γ · (−log q), q = σ(u) for the true class and 1 − σ(u) for the others, in numpy."""
    own = np.eye(C)[y] > 0
    q = np.where(own, 1 / (1 + np.exp(-u)), 1 / (1 + np.exp(u)))
    return ((1 - q) ** gamma * -np.log(q)).sum(1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_sigmoid_form_asks_one_question_per_class(problem, gamma):
    w, x, y = problem
    out, grad = run(w, x, y, pj.focal(form="sigmoid", gamma=gamma))
    np.testing.assert_allclose(out.losses, sigmoid_focal(x @ w, y, gamma), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: sigmoid_focal(x @ w, y, gamma).mean(), w), atol=1e-8)


def test_the_class_balanced_focal_loss_is_the_sigmoid_form_with_effective_weights(problem):
    """Cui et al.: weights ∝ (1 − β)/(1 − β^n), scaled to sum C, times the sigmoid focal loss of each sample."""
    w, x, y = problem
    counts = np.array([10, 2, 5, 1])
    links = pj.chain(pj.focal(form="sigmoid", gamma=0.5), pj.class_weighting(kind="effective", beta=0.99))
    out, _ = run(w, x, y, links, settings=dict(class_counts=counts))
    raw = (1 - 0.99) / (1 - 0.99**counts)
    np.testing.assert_allclose(out.losses, (raw * C / raw.sum())[y] * sigmoid_focal(x @ w, y, 0.5), rtol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_sigmoid_form_is_finite_up_to_certainty(gamma):
    u, y = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]]), jnp.array([[1.0, 0.0]] * 3)
    value, slope = jax.value_and_grad(lambda u: pj.sigmoid_focal_losses(u, y, gamma=gamma).sum())(u)
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert float(pj.sigmoid_focal_losses(u, y, gamma=gamma)[0]) == 0


def test_unknown_granularity_is_an_error():
    with pytest.raises(ValueError, match="focal needs granularity to be one of its names, got 'corpus'"):
        pj.focal(granularity="corpus")
    with pytest.raises(ValueError, match="focal needs form to be one of its names, got 'binary'"):
        pj.focal(form="binary")
    with pytest.raises(ValueError, match="focal needs granularity='sample' for form='sigmoid', got 'category'"):
        pj.focal(form="sigmoid", granularity="category")


def test_negative_gamma_is_an_error():
    with pytest.raises(ValueError, match="focal needs gamma >= 0, got -1"):
        pj.focal(gamma=-1.0)
