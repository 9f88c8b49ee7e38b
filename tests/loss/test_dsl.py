"""perturbjax.loss.dsl: prototypes chosen by loops, suggested labels, the memory of features, phases, and wrong labels found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from perturbjax.loss.dsl import DSLState, remember
from tests.loss.problem import DEEP, B, C, assert_close, cross_entropy, deep, difference, enable_x64, log_softmax, onehot, run


@pytest.fixture
def problem():
    with deep() as found:
        yield found


def unit(a):
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def by_loops(a, number, cut, alike):
    """Sample by sample: the indices of the prototypes, densest first."""
    n, s = len(a), a @ a.T
    level = sorted(s.flatten(), reverse=True)[int(cut * n * n)]
    rho = [sum(s[i, j] > level for j in range(n)) for i in range(n)]
    eta = [min(s[i]) if rho[i] == max(rho) else max(s[i, j] for j in range(n) if rho[j] > rho[i]) for i in range(n)]
    order = sorted(range(n), key=lambda i: -rho[i])
    return [i for i in order if eta[i] < alike][:number], rho


@pytest.mark.parametrize("seed", range(4))
def test_prototypes_are_the_dense_ones_that_differ(seed):
    rng = np.random.default_rng(seed)
    a = unit(np.concatenate([rng.normal(size=(1, 5)) + 0.25 * rng.normal(size=(12, 5)) for _ in range(3)]))
    with enable_x64(True):
        padded, valid = np.concatenate([a, np.zeros((4, 5))]), np.arange(40) < 36
        found, chosen = pj.choose_prototypes(jnp.asarray(padded), jnp.asarray(valid), number=8)
    expected, rho = by_loops(a, 8, 0.4, 0.95)
    assert chosen.sum() == len(expected)
    index = [int(np.abs(a - np.asarray(row)).sum(1).argmin()) for row in found[np.asarray(chosen)]]
    assert [rho[i] for i in index] == [rho[i] for i in expected]  # ties in density may come in any order


def test_a_class_of_equal_features_has_one_prototype_and_an_empty_one_none():
    same = jnp.broadcast_to(jnp.array([0.6, 0.8]), [10, 2])
    found, chosen = pj.choose_prototypes(same, jnp.ones([10], bool), number=4)
    assert chosen.sum() == 1 and np.allclose(found[np.argmax(chosen)], [0.6, 0.8])
    assert not pj.choose_prototypes(jnp.zeros([10, 2]), jnp.zeros([10], bool), number=4)[1].any()


def test_the_suggested_label_has_the_largest_mean_cosine():
    rng = np.random.default_rng(0)
    a, prototypes, chosen = rng.normal(size=(9, 4)), unit(rng.normal(size=(15, 4))).reshape(5, 3, 4), rng.random((5, 3)) < 0.6
    chosen[2] = False
    mean = np.array(
        [[(unit(a) @ prototypes[c].T)[i, chosen[c]].mean() if chosen[c].any() else -9 for c in range(5)] for i in range(9)]
    )
    found = pj.prototype_labels(jnp.float32(a), jnp.float32(prototypes), jnp.asarray(chosen))
    np.testing.assert_array_equal(found, mean.argmax(1))


def empty(size=4, number=2, dim=6):
    zeros = lambda n: jnp.zeros([C, n, dim], jnp.float32)
    return DSLState(zeros(size), jnp.zeros([C], jnp.int32), zeros(number), jnp.zeros([C, number], bool))


def test_the_memory_holds_the_latest_features_of_each_class():
    rng, state, written = np.random.default_rng(0), empty(), {c: [] for c in range(C)}
    for _ in range(5):
        features, labels = rng.normal(size=(9, 6)), rng.integers(-1, 3, 9)  # −1: padding; class 3 never comes
        state = jax.jit(remember)(state, jnp.float32(features), jnp.int32(labels))
        for a, y in zip(unit(features), labels):
            if y >= 0:
                written[y].append(a)
    for c in range(C):
        assert int(state.count[c]) == len(written[c])
        latest = np.array(written[c][-4:]).reshape(-1, 6)
        there = np.asarray(state.features[c, : len(latest)])
        sort = lambda rows: rows[np.argsort(rows[:, 0])]
        np.testing.assert_allclose(sort(there), sort(latest), rtol=1e-5)


def test_four_devices_remember_as_one():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32), jnp.asarray(rng.integers(0, C, 16), jnp.int32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    P = PartitionSpec
    mapped = jax.shard_map(
        lambda a, y: remember(empty(), a, y, axis_name="d"),
        mesh=mesh,
        in_specs=(P("d"), P("d")),
        out_specs=P(),
        check_vma=False,
    )
    assert_close(jax.jit(mapped)(features, labels), remember(empty(), features, labels), rtol=1e-6)


def chosen_state():
    """Prototypes of every class."""
    prototypes = unit(np.random.default_rng(5).normal(size=(C * 2, 6))).reshape(C, 2, 6).astype(np.float32)
    return empty()._replace(prototypes=jnp.asarray(prototypes), chosen=jnp.ones([C, 2], bool))


WITHIN = dict(settings=dict(steps_per_epoch=4), model=DEEP)  # with step 9: in the middle of an epoch


def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem):
    """The suggested labels are held."""
    params, x, y = problem
    state = chosen_state()
    out, grad = run(
        params, x, y, pj.dsl(weight=0.3, num_samples=4, num_prototypes=2), states=(state,),
        options=dict(progress=0.5, step=9), **WITHIN,
    )  # fmt: skip
    a = np.tanh(x @ params["a"])
    suggested = np.einsum("bd,cld->bc", unit(a), np.asarray(state.prototypes)).argmax(1)

    def loss(p):
        u = np.tanh(x @ p["a"]) @ p["w"].T + p["b"]
        return 0.7 * cross_entropy(u, onehot(y)) - 0.3 * log_softmax(u)[np.arange(B), suggested]

    np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9)
    assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-8)
    np.testing.assert_allclose(out.metrics["dsl/corrected"], (suggested != y).mean(), rtol=1e-6)


def test_before_the_start_and_before_the_first_prototypes_it_is_plain(problem):
    params, x, y = problem
    plain = run(params, x, y, (), model=DEEP)[0].losses
    for progress, state in [(0.3, chosen_state()), (0.9, empty())]:
        links = pj.dsl(num_samples=4, num_prototypes=2)
        out, _ = run(params, x, y, links, states=(state,), options=dict(progress=progress, step=9), **WITHIN)
        np.testing.assert_allclose(out.losses, plain, rtol=1e-12)


def test_prototypes_are_chosen_when_an_epoch_begins(problem):
    params, x, y = problem
    made = pj.objective(DEEP, pj.dsl(num_samples=8, num_prototypes=3), num_classes=C, steps_per_epoch=2)
    states, chosen = made.init(params, x), []
    for step in range(5):
        _, out = made(params, states, pj.batch(x, jnp.asarray(y)), step=step, progress=step / 6)
        states = out.states
        chosen.append(np.asarray(states[0].prototypes))
    assert not chosen[1].any() and chosen[2].any()
    np.testing.assert_array_equal(chosen[2], chosen[3])
    a = unit(np.tanh(x @ params["a"]))
    for c in np.unique(y):  # each is a feature of its class
        rows = chosen[2][c][np.asarray(states[0].chosen[c])]
        assert len(rows) and np.abs(rows[:, None] - a[y == c][None]).sum(2).min(1).max() < 1e-5


def test_the_memory_is_no_larger_than_the_largest_class(problem):
    params, x, _ = problem
    made = pj.objective(DEEP, pj.dsl(num_prototypes=3), num_classes=C, class_counts=np.array([9, 2, 5, 1]))
    assert made.init(params, x)[0].features.shape == (C, 9, 6)


def test_it_suggests_the_true_labels_of_clusters_with_a_third_of_wrong_labels():
    """In 30 dimensions; cosines within a cluster are about 0.6, so that several prototypes of a cluster differ (η < 0.95)."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, C, 400)
    x = (7 * np.eye(C, 30)[truth] + rng.normal(size=(400, 30))).astype(np.float32)
    y = np.where(rng.random(400) < 0.33, rng.integers(0, C, 400), truth)
    line = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a @ w})
    made = pj.objective(line, pj.dsl(num_samples=60), num_classes=C, class_counts=np.bincount(y), num_examples=400)
    w = jnp.eye(30)[:, :C]
    step = jax.jit(lambda states, x, y, step: made(w, states, pj.batch(x, y), step=step, progress=0.9)[1].states)
    states = made.init(w, x[:40])
    for number in range(20):
        i = 40 * number % 400
        states = step(states, x[i : i + 40], jnp.int32(y[i : i + 40]), number)
    found = pj.prototype_labels(jnp.asarray(x), states[0].prototypes, states[0].chosen)
    assert (np.asarray(found) == truth).mean() > 0.97 > (y == truth).mean()


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="dsl needs 0 <= weight <= 1, got 2"):
        pj.dsl(weight=2.0)
    with pytest.raises(ValueError, match="dsl needs num_prototypes >= 1, got 0"):
        pj.dsl(num_prototypes=0)
    with pytest.raises(ValueError, match="dsl needs 'features', got none"):
        pj.objective(lambda w, x: x @ w, pj.dsl(), num_classes=C)
    maps = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w})
    with pytest.raises(ValueError, match=r"dsl needs features \[B, d\], got \(2, 3, 3, 4\)"):
        pj.objective(maps, pj.dsl(), num_classes=C).init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
