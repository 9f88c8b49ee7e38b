"""perturbjax.logit.ldam: margins and loss of the authors' code in numpy, deferred re-weighting, and the head that it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbjax as pj
from perturbjax.models import create

C, COUNTS = 4, np.array([20, 1000, 5, 300])
LOGITS = pj.line(lambda w, u: u + w[None], scale=30.0)  # the inputs are the logits
MARGINS = 0.5 * (5 / COUNTS) ** 0.25


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


@pytest.fixture
def batch():
    """Logits 30·cos θ and labels, in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield 30 * rng.uniform(-1, 1, (11, C)), rng.integers(0, C, 11).astype(np.int32)


def run(links, u, y, *, progress=0.0, axis_name=None, counts=COUNTS, **fields):
    made = pj.objective(LOGITS, links, num_classes=C, class_counts=counts, axis_name=axis_name)
    w = jnp.zeros(C, u.dtype)
    return made(w, made.init(w, u), pj.batch(jnp.asarray(u), jnp.asarray(y), **fields), progress=progress)


def test_margins_are_a_constant_over_the_fourth_root_of_the_counts():
    found = np.asarray(pj.ldam_margins(COUNTS))
    np.testing.assert_allclose(found, MARGINS, rtol=1e-6)
    np.testing.assert_allclose(found * COUNTS**0.25, found[0] * COUNTS[0] ** 0.25, rtol=1e-6)
    assert found.max() == found[2] == 0.5
    np.testing.assert_allclose(pj.ldam_margins(COUNTS, margin=0.3), 0.6 * MARGINS, rtol=1e-6)


def test_loss_is_the_code_s_scale_times_cosine_less_margin(batch):
    u, y = batch
    expected = u / 30 - MARGINS[y][:, None] * np.eye(C)[y]
    _, out = run(pj.ldam(), u, y)
    np.testing.assert_allclose(out.losses, cross_entropy(30 * expected, y), rtol=1e-6)
    plain = cross_entropy(u, y)
    assert (out.losses > plain).all()


@given(st.lists(st.floats(-30, 30), min_size=C, max_size=C))
@settings(max_examples=20)
def test_rare_classes_are_raised_more_than_frequent_ones_at_the_same_logits(logits):
    """By up to s·Δ; the order of LPL's Figure 1: all positive, and rising towards the tail."""
    raised = []
    for c in np.argsort(-COUNTS):
        u = np.roll(np.array([logits], np.float32), c - 1)  # the same logits, as seen from the true class
        raised.append(float(run(pj.ldam(), u, np.array([c], np.int32))[0] - run((), u, np.array([c], np.int32))[0]))
    assert min(raised) >= 0 and (np.diff(raised) >= -1e-4).all() and max(raised) <= 15 + 1e-4


def test_on_a_cosine_head_the_scale_is_the_model_s():
    model = create("mlp", num_classes=C, mean=(0.5,), std=(1.0,), width=8, head="cosine")
    x, y = jax.random.uniform(jax.random.key(0), [6, 4, 4, 1]), np.array([0, 1, 2, 3, 2, 0], np.int32)
    params = model.init(jax.random.key(1), x)["params"]
    features = np.asarray(model.apply({"params": params}, x, stop="features"), np.float64)
    rows = np.asarray(params["logits"]["kernel"], np.float64).T
    cos = features @ rows.T / np.outer(np.linalg.norm(features, axis=1), np.linalg.norm(rows, axis=1))
    for scale in (30.0, 12.0):
        made = pj.objective(model.clone(scale=scale), pj.ldam(), num_classes=C, class_counts=COUNTS)
        _, out = made(params, made.init(params, x), pj.batch(x, y))
        expected = cross_entropy(scale * (cos - MARGINS[y][:, None] * np.eye(C)[y]), y)
        np.testing.assert_allclose(out.losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [pj.ldam, pj.cosface, pj.arcface, pj.adaptive_margin])
def test_a_linear_head_is_an_error_unless_a_scale_is_given(method):
    model = create("mlp", num_classes=C, mean=(0.5,), std=(1.0,), width=8)
    x, y = jnp.ones([2, 4, 4, 1]), np.array([0, 1], np.int32)
    params = model.init(jax.random.key(1), x)["params"]

    def loss(**settings):
        made = pj.objective(model, method(**settings), num_classes=C, class_counts=COUNTS)
        return made(params, made.init(params, x), pj.batch(x, y))[0]

    with pytest.raises(ValueError, match=rf"{method.__name__} needs 'cosine', got none. .*--head cosine"):
        loss()
    assert np.isfinite(loss(scale=1.0))


def effective(counts, beta=0.9999):
    raw = (1 - beta) / (1 - beta**counts)
    return raw / raw.sum() * len(counts)


def test_deferred_weights_are_ones_and_then_class_balanced():
    np.testing.assert_array_equal(pj.deferred_weights(COUNTS, progress=0.79), 1)
    found = pj.deferred_weights(COUNTS, progress=0.8)
    np.testing.assert_allclose(found, effective(COUNTS), rtol=1e-4)
    np.testing.assert_allclose(found, pj.class_weights(COUNTS, kind="effective"), rtol=1e-5)
    np.testing.assert_allclose(
        pj.deferred_weights(COUNTS, progress=0.3, start=0.2, beta=0.99), effective(COUNTS, 0.99), rtol=1e-4
    )


@pytest.mark.parametrize("per_epoch", [1, 7, 97, 390])
def test_they_begin_with_the_first_step_of_epoch_160_of_200(per_epoch):
    begun = jax.jit(lambda step: pj.deferred_weights(COUNTS, progress=step.astype(jnp.float32) / (200 * per_epoch))[2] > 1)
    assert not begun(jnp.int32(160 * per_epoch - 1)) and begun(jnp.int32(160 * per_epoch))


def test_drw_is_torch_s_weighted_mean_from_its_start_on(batch):
    u, y = batch
    losses = cross_entropy(u - 30 * MARGINS[y][:, None] * np.eye(C)[y], y)
    weights = effective(COUNTS)[y]
    np.testing.assert_allclose(run(pj.ldam(drw=True), u, y, progress=0.5)[0], losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        run(pj.ldam(drw=True), u, y, progress=0.9)[0], (weights * losses).sum() / weights.sum(), rtol=1e-4
    )
    mean, _ = run(pj.ldam(drw=True, average="batch"), u, y, progress=0.9)
    np.testing.assert_allclose(mean, (weights * losses).mean(), rtol=1e-4)
    both = pj.chain(pj.ldam(), pj.class_weighting(kind="effective"))
    np.testing.assert_allclose(mean, run(both, u, y)[0], rtol=1e-4)


def test_the_average_is_by_the_class_weights_alone_so_that_parts_of_the_loss_add_up(batch):
    """As PCGrad, DP-SGD and the gradient view need it: weights of samples choose, and class weights stay between the classes."""
    u, y = batch
    losses, weights = cross_entropy(u - 30 * MARGINS[y][:, None] * np.eye(C)[y], y), effective(COUNTS)[y]
    given = np.random.default_rng(1).uniform(0, 2, 11)
    found, _ = run(pj.ldam(drw=True), u, y, progress=1.0, weights=jnp.asarray(given))
    np.testing.assert_allclose(found, (given * weights * losses).sum() / weights.sum(), rtol=1e-4)
    parts = [run(pj.ldam(drw=True), u, y, progress=1.0, weights=jnp.asarray(y == c, float))[0] for c in range(C)]
    np.testing.assert_allclose(sum(parts), run(pj.ldam(drw=True), u, y, progress=1.0)[0], rtol=1e-9)
    assert run(pj.ldam(drw=True), u, y, progress=1.0, weights=jnp.zeros(11))[0] == 0


def test_padding_stays_out_of_the_average(batch):
    u, y = batch
    some, _ = run(pj.ldam(drw=True), u[4:], y[4:], progress=1.0)
    padded = np.r_[np.full(4, -1), y[4:]].astype(np.int32)
    found, _ = run(pj.ldam(drw=True), u, padded, progress=1.0, weights=jnp.asarray(np.r_[np.zeros(4), np.ones(7)]))
    np.testing.assert_allclose(found, some * 7 / 11, rtol=1e-6)


def test_drw_before_its_start_changes_nothing_bit_for_bit(batch):
    u, y = (x[:8] for x in batch)
    u = u.astype(np.float32)
    found = [
        jax.jit(lambda u, link=link: run(link, u, y, progress=0.5)[1].losses)(u) for link in (pj.ldam(), pj.ldam(drw=True))
    ]
    np.testing.assert_array_equal(*found)


def test_the_average_is_over_all_devices(batch):
    u, y = (jnp.asarray(x[:8]) for x in batch)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    P = jax.sharding.PartitionSpec
    loss = lambda u, y: jax.lax.pmean(run(pj.ldam(drw=True), u, y, progress=1.0, axis_name="d")[0], "d")
    four = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(), check_vma=False))(u, y)
    np.testing.assert_allclose(four, run(pj.ldam(drw=True), u, y, progress=1.0)[0], rtol=1e-9)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(margin=-0.1), "ldam needs margin >= 0, got -0.1"),
        (dict(scale=0.0), "ldam needs scale > 0, got 0.0"),
        (dict(start=1.5), "ldam needs 0 <= start <= 1, got 1.5"),
        (dict(beta=1.0), "ldam needs 0 < beta < 1, got 1.0"),
        (dict(average="mean"), "ldam needs average .* got 'mean'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.ldam(**settings)


def test_a_class_without_samples_is_an_error():
    with pytest.raises(ValueError, match="ldam needs at least one sample of every class, got none of class 1. Drop the class"):
        run(pj.ldam(), np.zeros([1, C], np.float32), np.zeros(1, np.int32), counts=np.array([3, 0, 2, 1]))
    with pytest.raises(ValueError, match="ldam needs 'class_counts', got none"):
        pj.objective(LOGITS, pj.ldam(), num_classes=C)
