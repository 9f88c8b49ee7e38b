"""perturbjax.label.d2l: the estimate of the dimension, the turning point, the label's share, over epochs and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import perturbjax as pj
from perturbjax.label.d2l import turning
from tests.label.problem import C

MODEL = {"features": lambda w, x: x, "logits": lambda w, a: a @ w}


def by_loops(a, k):
    found = []
    for i in range(len(a)):
        r = np.sort(np.linalg.norm(np.delete(a, i, 0) - a[i], axis=1))[:k]
        found.append(-1 / np.mean(np.log(r / r[-1])))
    return np.array(found)


@pytest.mark.parametrize("k", [3, 20, 200])
def test_estimate_is_the_equation(k):
    with jax.enable_x64(True):
        a = np.random.default_rng(0).normal(size=(40, 6))
        np.testing.assert_allclose(pj.local_dimension(jnp.asarray(a), num_neighbours=k), by_loops(a, min(k, 39)), rtol=1e-8)


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_estimate_finds_the_dimension(dimension):
    """Uniform points in a cube, embedded in 20 dimensions by a rotation."""
    rng = np.random.default_rng(dimension)
    points = rng.uniform(size=(2000, dimension)) @ np.linalg.qr(rng.normal(size=(20, 20)))[0][:dimension]
    found = float(pj.local_dimension(jnp.asarray(points, jnp.float32)).mean())
    assert dimension * 0.75 < found < dimension * 1.25


def test_estimate_is_over_all_devices():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6)), jnp.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    f = lambda a: pj.local_dimension(a, num_neighbours=5, axis_name="d")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)(a)
    np.testing.assert_allclose(mapped, pj.local_dimension(a, num_neighbours=5), rtol=1e-4)


def test_equal_samples_are_no_error():
    a = jnp.asarray(np.repeat(np.random.default_rng(0).normal(size=(3, 6)), 5, axis=0), jnp.float32)
    assert np.isfinite(pj.local_dimension(a, num_neighbours=4)).all()
    assert np.isfinite(pj.local_dimension(jnp.zeros([8, 3]))).all()


def states_after(lids, *, warm_up_epochs=2, window=3, tolerance=2.0, epochs=20):
    state = pj.d2l(warm_up_epochs=warm_up_epochs, window=window).init(pj.Context(C))
    for e, lid in enumerate(lids):
        state = turning(state, jnp.float32(lid), (e + 1) / epochs, warm_up_epochs=warm_up_epochs, tolerance=tolerance)
        yield state


def test_turning_point_and_label_share_in_numpy():
    lids = [9.0, 7.0, 6.0, 5.5, 5.0, 4.9, 4.8, 4.9, 5.0, 6.5, 7.0, 6.0]
    turned = False
    for e, state in enumerate(states_after(lids)):
        before = np.array(lids[max(e - 3, 0) : e])
        if e >= 5 and lids[e] > before.mean() + 2 * before.std():  # warm_up_epochs + window epochs are over
            turned = True
        alpha = np.exp(-(e + 1) / 20 * lids[e] / min(lids[: e + 1])) if turned else 1
        assert bool(state.turned) == turned
        np.testing.assert_allclose(state.alpha, alpha, rtol=1e-5)
    assert turned and not any(bool(s.turned) for s in states_after(lids[:8]))


def test_it_never_turns_before_the_warm_up_or_without_end_of_tolerance():
    growing = np.linspace(1, 10, 12)
    assert [bool(s.turned) for s in states_after(growing)] == [False] * 5 + [True] * 7
    assert not any(bool(s.turned) for s in states_after(growing, tolerance=np.inf))


def test_training_passes_through_the_turning_point():
    """Features that spread into more dimensions as the epochs go: plain until it turns, then towards the own predictions."""
    rng, link = np.random.default_rng(0), pj.d2l(num_neighbours=5, warm_up_epochs=1, window=2)
    made = pj.objective(MODEL, link, num_classes=C)
    w = jnp.asarray(rng.normal(size=(8, C)), jnp.float32)
    states, step = made.init(w, jnp.zeros([16, 8])), jax.jit(made)
    lids, turned = [], False
    for epoch in range(8):
        shares = []
        for batch in range(2):
            a = rng.normal(size=(16, 8)) * (np.arange(8) < 1 + epoch)[None]
            x, y = jnp.asarray(a, jnp.float32), jnp.asarray(rng.integers(0, C, 16), jnp.int32)
            _, out = step(w, states, pj.batch(x, y), epoch=epoch, progress=(2 * epoch + batch) / 16)
            states = out.states
            share = float(out.metrics["d2l/label_share"])
            log_p = np.asarray(jax.nn.log_softmax(x @ w))
            targets = share * np.eye(C)[y] + (1 - share) * np.eye(C)[log_p.argmax(1)]
            np.testing.assert_allclose(out.losses, -(targets * log_p).sum(1), rtol=1e-4, atol=1e-5)
            shares.append(share)
            lids.append(by_loops(a, 5).mean())
        assert shares[0] == shares[1]
        means = np.reshape(lids[: 2 * epoch], (-1, 2)).mean(1)
        turned |= epoch >= 4 and means[-1] > means[-3:-1].mean() + 2 * means[-3:-1].std()
        expected = np.exp(-epoch / 8 * means[-1] / means.min()) if turned else 1.0
        np.testing.assert_allclose(shares[0], expected, rtol=1e-3)
    assert turned


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="d2l needs window >= 1, got 0"):
        pj.d2l(window=0)
    with pytest.raises(ValueError, match="d2l needs 'features', got none"):
        pj.objective(lambda w, x: x @ w, pj.d2l(), num_classes=C)
