"""perturbjax.loss.class_weighting: both formulas, given weights, the loss and its gradient, and undistorted targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

import perturbjax as pj
from tests.loss.problem import MODEL, C, difference, linear, log_softmax

COUNTS = np.array([10, 2, 5, 1])


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def run(w, x, y, links, **fields):
    made = pj.objective(MODEL, links, num_classes=C, class_counts=COUNTS)
    (loss, out), grad = jax.value_and_grad(made, has_aux=True)(w, made.init(w, x), pj.batch(x, jnp.asarray(y), **fields))
    return loss, out, grad


def test_balanced_is_scikit_learn_s():
    labels = np.repeat(np.arange(C), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(C), y=labels)
    np.testing.assert_allclose(pj.class_weights(COUNTS, kind="balanced"), expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.9, 0.99, 0.9999, 1 - 1e-7])
@pytest.mark.parametrize("counts", [COUNTS, np.array([5000, 500, 50, 5])])
def test_effective_number_of_samples(beta, counts):
    """Cui et al., eq. 4, scaled to sum C; float32's 1 − β leaves four digits where both ends of the saturation meet."""
    raw = (1 - beta) / -np.expm1(counts * np.log1p(beta - 1))
    ours = pj.class_weights(counts, kind="effective", beta=beta)
    np.testing.assert_allclose(ours, raw * C / raw.sum(), rtol=2e-4)
    np.testing.assert_allclose(ours.sum(), C, rtol=1e-6)


def test_effective_lies_between_no_weights_and_inverse_frequency():
    weights = lambda beta: pj.class_weights(COUNTS, kind="effective", beta=beta)
    np.testing.assert_allclose(weights(1e-6), 1, rtol=1e-5)
    np.testing.assert_allclose(weights(1 - 1e-7), 1 / COUNTS * C / (1 / COUNTS).sum(), rtol=1e-5)
    np.testing.assert_array_equal(pj.class_weights(COUNTS, kind="none"), 1)


@pytest.mark.parametrize(
    "settings", [dict(kind="balanced"), dict(kind="effective", beta=0.9), dict(weights=(2.0, 0.0, 1.0, 0.5))]
)
def test_loss_and_gradient_are_the_mean_of_weighted_losses(problem, settings):
    w, x, y = problem
    loss, _, grad = run(w, x, y, pj.class_weighting(**settings))
    given = settings.get("weights")
    factor = np.asarray(pj.class_weights(COUNTS, **settings) if given is None else given, np.float64)[y]
    plain = lambda w: (factor * -log_softmax(x @ w)[np.arange(7), y]).mean()
    np.testing.assert_allclose(loss, plain(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(plain, w), atol=1e-9)


@pytest.mark.parametrize("settings", [dict(kind="balanced"), dict(kind="none"), dict(weights=(2.0, 0.0, 1.0, 0.5))])
def test_averaged_over_the_weights_it_is_the_weighted_mean(problem, settings):
    """Σ w_y ℓ / Σ w_y, as torch averages a weighted cross entropy."""
    w, x, y = problem
    loss, _, grad = run(w, x, y, pj.class_weighting(average="weights", **settings))
    factor = np.asarray(settings.get("weights", pj.class_weights(COUNTS, kind=settings.get("kind", "none"))), np.float64)[y]
    plain = lambda w: (factor * -log_softmax(x @ w)[np.arange(7), y]).sum() / factor.sum()
    np.testing.assert_allclose(loss, plain(w), rtol=1e-12)
    np.testing.assert_allclose(grad, difference(plain, w), atol=1e-9)


def test_averaged_over_the_weights_deferred_weights_begin_as_plain_training(problem):
    w, x, y = problem
    made = pj.objective(MODEL, pj.class_weighting(start=0.8, average="weights"), num_classes=C, class_counts=COUNTS)
    at = lambda progress: made(w, made.init(w, x), pj.batch(x, jnp.asarray(y)), progress=progress)[0]
    losses, factor = -log_softmax(x @ w)[np.arange(7), y], np.asarray(pj.class_weights(COUNTS))[y]
    np.testing.assert_allclose(at(0.7), losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(at(0.8), (factor * losses).sum() / factor.sum(), rtol=1e-12)


def test_averaged_over_the_weights_a_batch_without_any_weight_has_no_loss_and_no_nan(problem):
    w, x, _ = problem
    loss, _, grad = run(w, x, np.ones(7, np.int32), pj.class_weighting(weights=(1.0, 0.0, 1.0, 1.0), average="weights"))
    assert loss == 0 and (grad == 0).all()


def test_averaged_over_the_weights_four_devices_are_one(problem):
    rng = np.random.default_rng(1)
    w, x, y = (jnp.asarray(v) for v in (rng.normal(size=(5, C)), rng.normal(size=(16, 5)), rng.integers(0, C, 16)))

    def loss(w, x, y, axis_name=None):
        links = pj.class_weighting(average="weights")
        made = pj.objective(MODEL, links, num_classes=C, class_counts=COUNTS, axis_name=axis_name)
        value = made(w, ((),), pj.batch(x, y))[0]
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    P, mesh = jax.sharding.PartitionSpec, jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda w, x, y: loss(w, x, y, "d"), mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(mapped)(w, x, y), loss(w, x, y), rtol=1e-9)


def test_smoothed_targets_keep_their_proportions(problem):
    """The factor is the sample's; a weight on each class's term would pull the optimum away from the smoothed targets."""
    w, x, y = problem
    chain = pj.chain(pj.class_weighting(weights=(2.0, 1.0, 3.0, 4.0)), pj.label_smoothing(weight=0.2))
    _, out, _ = run(w, x, y, chain)
    losses = -((0.8 * np.eye(C)[y] + 0.05) * log_softmax(x @ w)).sum(1)
    np.testing.assert_allclose(out.losses, np.array([2.0, 1.0, 3.0, 4.0])[y] * losses, rtol=1e-9)


def test_it_multiplies_the_weights_the_samples_bring(problem):
    w, x, y = problem
    weights = jnp.linspace(0.0, 2.0, 7, dtype=jnp.float32)
    _, out, _ = run(w, x, y, pj.class_weighting(weights=(2.0, 1.0, 3.0, 4.0)), weights=weights)
    expected = np.asarray(weights) * np.array([2.0, 1.0, 3.0, 4.0])[y] * -log_softmax(x @ w)[np.arange(7), y]
    np.testing.assert_allclose(out.losses, expected, rtol=1e-6)


@pytest.mark.parametrize("progress, weighted", [(0.0, False), (0.79, False), (0.8, True), (1.0, True)])
def test_deferred_weights_act_late(problem, progress, weighted):
    """Deferred re-weighting (LDAM-DRW): all weights are 1 until `start`."""
    w, x, y = problem
    made = pj.objective(MODEL, pj.class_weighting(kind="effective", start=0.8), num_classes=C, class_counts=COUNTS)
    _, out = made(w, made.init(w, x), pj.batch(x, jnp.asarray(y)), progress=progress)
    factor = np.asarray(pj.class_weights(COUNTS, kind="effective"), np.float64)[y] if weighted else 1.0
    np.testing.assert_allclose(out.losses, factor * -log_softmax(x @ w)[np.arange(7), y], rtol=1e-6)


def test_given_weights_may_be_traced():
    """A sweep over weights shares one state."""
    made = lambda weights: pj.objective(MODEL, pj.class_weighting(weights=weights), num_classes=2)
    w, x, y = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    states = made((1.0, 1.0)).init(w, x)
    loss = jax.jit(lambda first: made((first, 1.0))(w, states, pj.batch(x, y))[0])
    np.testing.assert_allclose(loss(3.0), 2 * loss(1.0), rtol=1e-6)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="needs at least one sample of every class, got none of class 1. Drop the class"):
        pj.class_weights(np.array([3, 0, 2]))
    objective = lambda links, **kw: pj.objective(MODEL, links, num_classes=C, **kw)
    with pytest.raises(ValueError, match="class_weighting needs 4 weights, got 2. Give one per class."):
        objective(pj.class_weighting(weights=(1.0, 2.0))).init(jnp.ones([5, C]), jnp.ones([7, 5]))
    with pytest.raises(ValueError, match="class_weighting needs 'class_counts', got none"):
        objective(pj.class_weighting())
    with pytest.raises(ValueError, match="got none of class 3"):
        objective(pj.class_weighting(), class_counts=[1, 1, 1, 0]).init(jnp.ones([5, C]), jnp.ones([7, 5]))
    with pytest.raises(
        ValueError, match="class_weighting needs kind to be one of its names, got 'balance'. Did you mean 'balanced'"
    ):
        pj.class_weighting(kind="balance")
    with pytest.raises(ValueError, match="class_weighting needs 0 < beta < 1, got 1.0. The limit 1 is"):
        pj.class_weighting(beta=1.0)
    with pytest.raises(ValueError, match="class_weighting needs 0 <= start <= 1, got 2"):
        pj.class_weighting(start=2.0)
    with pytest.raises(ValueError, match="class_weighting needs average to be one of its names, got 'mean'"):
        pj.class_weighting(average="mean")
    with pytest.raises(ValueError, match="class_weighting needs weights >= 0"):
        pj.class_weighting(weights=(1.0, -2.0, 1.0, 1.0))


@pytest.mark.parametrize("padding", range(C))
def test_padding_is_not_in_the_sum_of_the_weights_whatever_its_label_is(problem, padding):
    w, x, y = problem
    made = pj.objective(MODEL, pj.class_weighting(weights=(1.0, 5.0, 10.0, 2.0), average="weights"), num_classes=C)
    whole, _ = made(w, made.init(w, x), pj.batch(x, y))
    padded = pj.batch(
        jnp.concatenate([x, x[:2]]), jnp.concatenate([jnp.asarray(y), jnp.full([2], padding, jnp.int32)]),
        weights=jnp.concatenate([jnp.ones(len(y)), jnp.zeros(2)]),
    )  # fmt: skip
    more, _ = made(w, made.init(w, padded.inputs), padded)
    np.testing.assert_allclose(more * (len(y) + 2), whole * len(y), rtol=1e-6)
    # A part of the batch, chosen by `weights` for its gradient, is divided by the sum of the whole batch's: the parts add up to it.
    first = jnp.arange(len(y)) < 3
    parts = [made(w, made.init(w, x), pj.batch(x, y), weights=part.astype(jnp.float32))[0] for part in (first, ~first)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
