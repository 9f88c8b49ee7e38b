"""perturbjax.logit.logpert: the exact solution, the two searches against loops in numpy, the memory, and what they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import optimize

import perturbjax as pj
from tests.loss.problem import MODEL, C, difference, linear

B, N = 8, 20
INDEX = np.array([3, 17, 0, 9, 4, 12, 19, 7], np.int32)


@pytest.fixture
def problem():
    with linear(size=B) as found:
        yield found


def softmax(u):
    return np.exp(u - u.max(1, keepdims=True)) / np.exp(u - u.max(1, keepdims=True)).sum(1, keepdims=True)


def cross_entropy(u, y):
    return -np.log(softmax(u))[np.arange(len(y)), y]


def objective(link, num_examples=N, **options):
    return pj.objective(MODEL, link, num_classes=C, num_examples=num_examples, **options)


def run(w, x, y, link, *, states=None, index=INDEX, progress=0.0, **fields):
    made = objective(link)
    states = made.init(w, x) if states is None else states
    data = pj.batch(x, jnp.asarray(y), index=jnp.asarray(index), **fields)
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, states, data, progress=progress)
    return out, grad


# ---------------------------------------------------------------------------------------------------- the exact solution


@pytest.mark.parametrize("weight", [0.05, 0.175, 0.35, 0.75])
def test_exact_solution_is_the_minimum(problem, weight):
    """Of CE(u + v, y) + λ‖v‖₁ by scipy, on v = v⁺ − v⁻ with v± ≥ 0, where the norm is smooth."""
    w, x, y = problem
    u = x @ w
    ours = np.asarray(pj.logpert_delta(jnp.asarray(u), jnp.asarray(y), weight=weight))
    for i in range(B):

        def cost(parts, i=i):
            v = parts[:C] - parts[C:]
            return cross_entropy((u[i] + v)[None], y[i : i + 1])[0] + weight * parts.sum()

        best = optimize.minimize(cost, np.full(2 * C, 0.1), bounds=[(0, None)] * 2 * C, options=dict(ftol=1e-14, gtol=1e-9))
        at = cost(np.concatenate([np.maximum(ours[i], 0), np.maximum(-ours[i], 0)]))
        assert at <= best.fun + 1e-9
        np.testing.assert_allclose(ours[i], best.x[:C] - best.x[C:], atol=2e-3)


def test_true_probability_is_lifted_to_one_minus_weight_and_only_there(problem):
    w, x, y = problem
    u = x @ w
    delta = np.asarray(pj.logpert_delta(jnp.asarray(u), jnp.asarray(y), weight=0.35))
    before, after = (softmax(a)[np.arange(B), y] for a in (u, u + delta))
    np.testing.assert_allclose(after, np.maximum(before, 0.65), rtol=1e-12)
    assert (before < 0.65).any() and (before > 0.65).any()
    np.testing.assert_array_equal(delta[~np.eye(C, dtype=bool)[y]], 0)


def test_the_worked_example_of_equation_51():
    u, y = np.array([[3.0, 0.8, 0.2]]), np.array([1])
    np.testing.assert_allclose(cross_entropy(u, y), 2.36, atol=0.005)
    np.testing.assert_allclose(cross_entropy(u + [[-1.0, 2.0, 0.0]], y), 0.42, atol=0.005)
    delta = np.asarray(pj.logpert_delta(jnp.asarray(u), jnp.asarray(y), weight=0.35), np.float64)
    np.testing.assert_allclose(cross_entropy(u + delta, y), -np.log(0.65), rtol=1e-5)
    # It is worth its price: the paper's vector of size 3 costs more.
    assert -np.log(0.65) + 0.35 * np.abs(delta).sum() < 0.42 + 0.35 * 3


def test_proximal_steps_lead_to_the_same_numbers(problem):
    w, x, y = problem
    u = jnp.asarray(x @ w)
    slope = lambda v: jax.nn.softmax(u + v) - jnp.eye(C)[y]
    searched = pj.proximal_search(slope, jnp.zeros_like(u), weight=0.35)
    np.testing.assert_allclose(searched, pj.logpert_delta(u, jnp.asarray(y), weight=0.35), atol=1e-9)


def test_l2_meets_its_optimality_condition(problem):
    """p(u + v) − y + 2λv = 0."""
    w, x, y = problem
    u = x @ w
    delta = np.asarray(pj.logpert_delta(jnp.asarray(u), jnp.asarray(y), weight=0.2, norm="l2"))
    np.testing.assert_allclose(delta, (np.eye(C)[y] - softmax(u + delta)) / 0.4, atol=1e-10)
    assert (np.abs(delta) > 1e-6).all()  # every entry of every sample


@pytest.mark.parametrize("weight", [1.0, 1.5, 100.0])
def test_a_large_weight_is_plain_training_bit_for_bit(problem, weight):
    w, x, y = problem
    (out, grad), (plain, plain_grad) = run(w, x, y, pj.logpert(weight=weight)), run(w, x, y, ())
    np.testing.assert_array_equal(out.losses, plain.losses)
    np.testing.assert_array_equal(grad, plain_grad)
    out, _ = run(w, x, y, pj.logpert(weight=weight, inference="acs"))  # and the search stays at zero
    np.testing.assert_array_equal(out.losses, plain.losses)
    np.testing.assert_array_equal(out.states[0].delta, 0)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(scale):
    u = scale * jnp.array([[80.0, -80.0, 0.0], [0.0, 0.0, 0.0]])
    delta = pj.logpert_delta(u, jnp.array([1, 2]), weight=0.175)
    assert np.isfinite(delta).all() and delta[0, 1] > 159 * scale


def test_bfloat16_is_computed_in_float32_and_padding_is_left_alone():
    u = jnp.array([[3.0, 0.5, 0.25], [3.0, 0.5, 0.25]], jnp.bfloat16)
    delta = jax.jit(pj.logpert_delta)(u, jnp.array([1, -1]), weight=0.35)
    assert delta.dtype == jnp.float32 and delta[0, 1] > 2
    np.testing.assert_array_equal(delta[1], 0)


def test_mixed_targets_lift_the_dominant_class_to_its_own_share(problem):
    w, x, y = problem
    targets = 0.7 * np.eye(C)[y] + 0.3 * np.eye(C)[(y + 1) % C]
    out, _ = run(w, x, y, pj.logpert(weight=0.35), targets=jnp.asarray(targets))
    p, before = (softmax(np.asarray(u))[np.arange(B), y] for u in (out.logits, x @ w))
    np.testing.assert_allclose(p, np.maximum(before, 0.35), rtol=1e-10)


@pytest.mark.parametrize("inference", ["exact", "acs"])
def test_losses_never_grow_and_no_gradient_leaks(problem, inference):
    """The parameters' gradient is that of the loss at u + v with v held; by finite differences."""
    w, x, y = problem
    out, grad = run(w, x, y, pj.logpert(inference=inference))
    held = np.asarray(out.logits) - x @ w
    assert (out.losses <= cross_entropy(x @ w, y) + 1e-12).all()
    loss = lambda w: cross_entropy(x @ w + held, y).mean()
    np.testing.assert_allclose(grad, difference(loss, w), atol=1e-8)


def test_after_logit_adjustment_it_moves_the_adjusted_logits(problem):
    w, x, y = problem
    counts = np.array([50, 20, 10, 5])
    made = objective(pj.chain(pj.logit_adjustment(), pj.logpert(weight=0.35)), class_counts=counts)
    _, out = made(w, made.init(w, x), pj.batch(x, jnp.asarray(y)))
    u = x @ w + np.log(counts / counts.sum())
    np.testing.assert_allclose(out.losses, np.minimum(cross_entropy(u, y), -np.log(0.65)), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ the searches


def batches(steps):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        index = rng.permutation(N)[:B].astype(np.int32)
        yield rng.normal(size=(B, 5)), rng.integers(0, C, B).astype(np.int32), index


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_alternate_search_is_a_loop_in_numpy(problem, norm):
    """Each visit: v_i from the table, two proximal steps down the sample's own loss, back to the table; then the loss."""
    w, states, table = problem[0], None, np.zeros((N, C))
    link = pj.logpert(weight=0.3, norm=norm, inference="acs", step_size=1.5, num_steps=2)
    for x, y, index in batches(4):
        out, _ = run(w, x, y, link, states=states, index=index)
        states, u = out.states, x @ w
        for i in range(B):
            for _ in range(2):
                p = softmax((u[i] + table[index[i]])[None])[0]
                moved = table[index[i]] - 1.5 * (p - np.eye(C)[y[i]])
                shrunk = np.sign(moved) * np.maximum(np.abs(moved) - 0.45, 0)
                table[index[i]] = shrunk if norm == "l1" else moved / (1 + 2 * 0.45)
        np.testing.assert_allclose(states[0].delta, table, atol=1e-12)
        np.testing.assert_allclose(out.losses, cross_entropy(u + table[index], y), rtol=1e-9)


def test_alternate_search_comes_to_the_exact_solution(problem):
    w, x, y = problem
    link, states = pj.logpert(inference="acs"), None
    for _ in range(60):
        out, _ = run(w, x, y, link, states=states)
        states = out.states
    exact = pj.logpert_delta(jnp.asarray(x @ w), jnp.asarray(y), weight=0.35)
    np.testing.assert_allclose(np.asarray(states[0].delta)[INDEX], exact, atol=1e-6)


def test_joint_search_is_sgd_with_dense_momentum(problem):
    """The official code's: loss mean CE(u + v, y) + λΣ|v|/B, momentum on the whole table, v of the last visit in the network."""
    w, states = problem[0], None
    table, momentum, moved = np.zeros((N, C)), np.zeros((N, C)), False
    link = pj.logpert(weight=0.3, inference="joint", step_size=6.0, decay=0.9, milestones=(0.5, 0.75))
    for (x, y, index), progress in zip(batches(4), (0.0, 0.4, 0.6, 0.8)):
        out, _ = run(w, x, y, link, states=states, index=index, progress=progress)
        np.testing.assert_allclose(out.losses, cross_entropy(x @ w + table[index], y), rtol=1e-9)
        states, before = out.states, table.copy()
        gradient = np.zeros((N, C))
        gradient[index] = (softmax(x @ w + table[index]) - np.eye(C)[y] + 0.3 * np.sign(table[index])) / B
        momentum = 0.9 * momentum + gradient
        table = table - 6.0 * {0.0: 1, 0.4: 1, 0.6: 0.1, 0.8: 0.01}[progress] * momentum
        np.testing.assert_allclose(states[0].delta, table, rtol=1e-6, atol=1e-12)
        absent = np.setdiff1d(np.arange(N), index)
        moved |= bool((table[absent] != before[absent]).any())
    assert moved  # rows move while their sample is not in the batch
    visited = np.abs(table).sum(1) > 0
    assert (np.abs(table[visited]) > 0).all()  # and every class moves, not only the true one


def test_searches_follow_the_links_after_them(problem):
    """With label smoothing behind it, the search descends the smoothed loss."""
    w, x, y = problem
    made = objective(pj.chain(pj.logpert(inference="acs", step_size=1.0, weight=0.1), pj.label_smoothing(weight=0.4)))
    _, out = made(w, made.init(w, x), pj.batch(x, jnp.asarray(y), index=jnp.asarray(INDEX)))
    step = 0.6 * np.eye(C)[y] + 0.1 - softmax(x @ w)
    np.testing.assert_allclose(np.asarray(out.logits) - x @ w, np.sign(step) * np.maximum(np.abs(step) - 0.1, 0), atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("inference", ["exact", "acs", "joint"])
def test_memory_sums_the_size_of_every_visit(problem, inference):
    w, states, link = problem[0], None, pj.logpert(inference=inference, memory=True)
    size, visits = np.zeros(N), np.zeros(N, int)
    for x, y, index in batches(5):
        out, _ = run(w, x, y, link, states=states, index=index)
        states = out.states
        size[index] += np.abs(np.asarray(out.logits) - x @ w).sum(1)
        visits[index] += 1
    found, counted = pj.perturbation_sizes({"anything": [out.states]})
    np.testing.assert_allclose(found, size, atol=1e-9)
    np.testing.assert_array_equal(counted, visits)
    assert size.sum() > 1


def test_memory_ranks_wrong_labels_first():
    """A linear net on two clouds, a tenth of the labels flipped: the flipped ones needed most."""
    rng = np.random.default_rng(3)
    true = rng.integers(0, 2, 200)
    x = np.where(true, 1.5, -1.5)[:, None] + rng.normal(size=(200, 4))
    flipped = np.zeros(200, bool)
    flipped[rng.permutation(200)[:20]] = True
    y = jnp.asarray(np.where(flipped, 1 - true, true), jnp.int32)
    made = pj.objective(MODEL, pj.logpert(memory=True), num_classes=2, num_examples=200)
    w, x = jnp.zeros([4, 2]), jnp.asarray(x, jnp.float32)
    states, step = made.init(w, x), jax.jit(jax.grad(made, has_aux=True))
    for _ in range(30):
        grad, out = step(w, states, pj.batch(x, y, index=jnp.arange(200)))
        w, states = w - 0.5 * grad, out.states
    size, visits = pj.perturbation_sizes(states)
    assert (visits == 30).all()
    assert flipped[np.argsort(-np.asarray(size))[:20]].mean() >= 0.9


@pytest.mark.parametrize("inference", ["exact", "acs", "joint"])
def test_tables_are_the_same_on_any_number_of_devices(inference):
    rng = np.random.default_rng(2)
    w, x = jnp.asarray(rng.normal(size=(5, C)), jnp.float32), jnp.asarray(rng.normal(size=(B, 5)), jnp.float32)
    data = pj.batch(x, jnp.asarray(rng.integers(0, C, B), jnp.int32), index=jnp.asarray(INDEX))
    link = pj.logpert(inference=inference, memory=True)

    def two_steps(w, states, data, axis_name=None):
        made = objective(link, axis_name=axis_name)
        for _ in range(2):
            (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, states, data)
            grad = grad if axis_name is None else jax.lax.pmean(grad, axis_name)
            w, states = w - 0.1 * grad, out.states
        return w, states

    states = objective(link).init(w, x)
    one = jax.jit(two_steps)(w, states, data)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(two_steps)(w, states, jax.device_put(data, NamedSharding(mesh, P("d"))))
    mapped = jax.shard_map(
        lambda w, s, d: two_steps(w, s, d, "d"), mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=False
    )
    for other in (sharded, jax.jit(mapped)(w, states, data)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


# --------------------------------------------------------------------------------------------------------------- bad input


def test_errors_say_what_was_given(problem):
    w, x, y = problem
    for weight in (0, -0.1):
        with pytest.raises(ValueError, match=f"logpert needs weight > 0, got {weight}"):
            pj.logpert(weight=weight)
    with pytest.raises(ValueError, match="logpert needs inference to be one of its names, got 'joined'. Did you mean 'joint'"):
        pj.logpert(inference="joined")
    with pytest.raises(ValueError, match="logpert needs norm to be one of its names, got 'l0'"):
        pj.logpert(norm="l0")
    for settings in (
        dict(step_size=1.0),
        dict(num_steps=2),
        dict(decay=0.5),
        dict(milestones=(0.5,)),
        dict(inference="joint", num_steps=2),
    ):
        with pytest.raises(ValueError, match=r"logpert uses \w+ with inference=(acs|joint|acs or joint) only, got inference="):
            pj.logpert(**settings)
    for settings in (dict(inference="acs"), dict(inference="joint"), dict(memory=True)):
        with pytest.raises(ValueError, match="logpert needs num_examples for .*, got none. Pass pj.objective"):
            objective(pj.logpert(**settings), num_examples=None).init(w, x)
    for settings in (dict(inference="acs"), dict(memory=True)):
        with pytest.raises(ValueError, match=r"logpert needs indices in 0\.\.19, got 20 at position 2 of the batch"):
            run(w, x, y, pj.logpert(**settings), index=np.array([0, 1, 20, 3, 4, 5, 6, 7]))
    with pytest.raises(ValueError, match="perturbation_sizes needs a state with logpert's memory, got none"):
        pj.perturbation_sizes(objective(pj.logpert()).init(w, x))


def test_errors_of_the_bare_function():
    u, y = jnp.zeros([2, 3]), jnp.array([0, 1])
    with pytest.raises(ValueError, match=r"logpert_delta needs finite logits, got nan at \[1, 2\] \(1 such entries\)"):
        pj.logpert_delta(u.at[1, 2].set(jnp.nan), y, weight=0.35)
    with pytest.raises(ValueError, match="logpert_delta needs weight > 0, got 0"):
        pj.logpert_delta(u, y, weight=0)
    with pytest.raises(ValueError, match=r"logpert_delta needs logits \[B, C\] and labels \[B\]"):
        pj.logpert_delta(u[None], y, weight=0.35)


def test_a_memory_is_off_by_default_and_costs_no_state(problem):
    w, x, _ = problem
    assert jax.tree.leaves(objective(pj.logpert(), num_examples=None).init(w, x)) == []
