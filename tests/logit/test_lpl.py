"""perturbjax.logit.lpl: Algorithm 2 in numpy, the number of steps, directions, splits, bounds, company (LA, mixup), no leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj

C, COUNTS = 4, np.array([10, 40, 5, 20])
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
MODEL = pj.line(lambda w, u: u + w[None])  # the inputs are the logits
ZERO = np.zeros(C, np.float32)
ce = optax.softmax_cross_entropy_with_integer_labels


def softmax(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(u, targets):
    return -(targets * np.log(softmax(u))).sum(1)


def algorithm_2(u, targets, labels, direction, steps, alpha, radius=np.inf):
    """The paper's Algorithm 2, class by class, in float64: u^K − u. `radius`: of the ball projected on after each step."""
    delta = np.zeros(u.shape)
    for c in set(labels.tolist()):
        mine = labels == c
        for _ in range(int(steps[c])):
            residual = softmax(u[mine] + delta[mine]) - targets[mine]
            moved = delta[mine][0] + direction[c] * alpha * residual.mean(0)
            delta[mine] = moved * min(1.0, np.broadcast_to(radius, C)[c] / max(np.linalg.norm(moved), 1e-30))
    return delta


def data(seed):
    """Logits and labels; class 3 is absent from the first one."""
    rng = np.random.default_rng(seed)
    return rng.normal(scale=2.0, size=(13, C)), rng.integers(0, C - (seed == 0), 13).astype(np.int32)


@pytest.fixture
def batch():
    return data(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def objective(links):
    return pj.objective(MODEL, links, num_classes=C, class_counts=COUNTS)


def run(links, u, labels, states=None, *, w=ZERO, **fields):
    """(Output, gradient with respect to a shift of the logits) of one pass."""
    made, batch = objective(links), pj.batch(jnp.asarray(u, jnp.float32), jnp.asarray(labels), **fields)
    states = made.init(w, batch.inputs) if states is None else states
    grad, out = jax.grad(made, has_aux=True)(jnp.asarray(w), states, batch)
    return out, grad


# ------------------------------------------------------------------------------------------------------ the function


def delta_of(u, labels, **settings):
    return pj.lpl_delta(jnp.asarray(u), jnp.asarray(labels), **settings)


@pytest.mark.parametrize("seed", range(3))
def test_delta_is_algorithm_2_with_each_class_its_own_number_of_steps(seed, float64):
    u, y = data(seed)
    bound, steps = np.array([0.9, 0.3, 0.0, 1.29]), [3, 1, 0, 4]
    ours = delta_of(u, y, direction=SIGN, bound=bound, step_size=0.3)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, algorithm_2(u, np.eye(C)[y], y, SIGN, steps, 0.3), rtol=1e-9, atol=1e-12)


def test_many_steps_run_in_a_loop_to_the_same_numbers(float64):
    u, y = data(1)
    bound = np.array([2.3, 0.1, 1.5, 0.05])
    ours = delta_of(u, y, direction=SIGN, bound=bound, step_size=0.1)
    np.testing.assert_allclose(ours, algorithm_2(u, np.eye(C)[y], y, SIGN, [23, 1, 15, 0], 0.1), rtol=1e-9, atol=1e-12)


def test_one_step_is_the_slope_of_the_class_loss(batch, float64):
    u, y = batch
    delta = np.asarray(delta_of(u, y, direction=1.0, bound=0.1, step_size=0.1))
    for c in np.unique(y):
        loss = lambda shift: cross_entropy(u[y == c] + shift, np.eye(C)[y[y == c]]).mean()
        slope = np.array([(loss(e) - loss(-e)) / 2e-5 for e in 1e-5 * np.eye(C)])
        np.testing.assert_allclose(delta[y == c] / 0.1, np.tile(slope, [(y == c).sum(), 1]), atol=1e-9)


def test_equals_pgd_at_the_logits(batch):
    u, y = jnp.asarray(batch[0], jnp.float32), jnp.asarray(batch[1])
    ours = delta_of(u, y, direction=SIGN, bound=np.array([0.9, 0.3, 0.0, 0.6]), step_size=0.3)
    steps = jnp.array([3, 1, 0, 2])
    search = lambda u: pj.pgd(
        lambda v: ce(v, y), u, y, C, direction=SIGN, step_size=0.3, num_steps=steps, max_steps=3, step="raw"
    )
    pgd, _ = search(u)
    np.testing.assert_allclose(ours, pgd, rtol=1e-5, atol=1e-6)


def test_zero_bound_is_no_perturbation_bit_for_bit(batch):
    u, y = jnp.asarray(batch[0], jnp.float32), jnp.asarray(batch[1])
    np.testing.assert_array_equal(delta_of(u, y, direction=SIGN, bound=0.0, step_size=0.1), 0.0)


def test_bfloat16_logits_are_computed_in_float32(batch):
    u, y = jnp.asarray(batch[0], jnp.bfloat16), jnp.asarray(batch[1])
    kw = dict(direction=SIGN, bound=0.5, step_size=0.1)
    ours = delta_of(u, y, **kw)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, delta_of(u.astype(jnp.float32), y, **kw))


@pytest.mark.parametrize("bound, step_size, steps", [(0.9, 0.3, 3), (0.3, 0.1, 3), (0.7, 0.1, 7), (0.29, 0.1, 2), (5, 0.1, 50)])
def test_number_of_steps(bound, step_size, steps):
    assert int(pj.lpl_steps(bound, step_size)) == steps
    assert int(jax.jit(pj.lpl_steps)(jnp.float32(bound), jnp.float32(step_size))) == steps


def test_number_of_steps_of_all_round_pairs():
    bound, step_size = np.meshgrid(np.arange(1, 501), np.arange(1, 31))  # in hundredths, where the division is exact
    ours = pj.lpl_steps(jnp.asarray(bound / 100, jnp.float32), jnp.asarray(step_size / 100, jnp.float32))
    np.testing.assert_array_equal(ours, bound // step_size)


# ----------------------------------------------------------------------------------------------------- the transform


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_plus_raises_and_minus_lowers_the_loss_of_every_class(batch, direction):
    out, _ = run(pj.lpl(bound=0.5, direction=direction), *batch)
    change = out.losses - run((), *batch)[0].losses
    for c in np.unique(batch[1]):
        assert direction * change[batch[1] == c].mean() > 1e-3


def test_fixed_bound_split_by_accuracy(batch):
    """q̄ is the batch's mean in the first step and the running mean from then on; τ its mean over the classes seen (eq. 13)."""
    u, y = batch
    states, mean = None, None
    for factor in (1.0, 0.5):
        out, _ = run(pj.lpl(bound=0.5, step_size=0.1), factor * u, y, states)
        p, present, states = softmax(factor * u), np.unique(y), out.states
        now = np.array([p[y == c, c].mean() for c in present])
        mean = now if mean is None else 0.9 * mean + 0.1 * now
        sign = np.zeros(C)
        sign[present] = np.where(mean <= mean.mean(), 1, -1)
        assert (out.metrics["lpl/raised"], out.metrics["lpl/lowered"]) == ((sign > 0).sum(), (sign < 0).sum())
        np.testing.assert_allclose(out.states[0].mean[present], mean, rtol=1e-5)
        expected = factor * u + algorithm_2(factor * u, np.eye(C)[y], y, sign, [5] * C, 0.1)
        np.testing.assert_allclose(out.logits, expected, rtol=1e-5, atol=1e-6)


def test_varied_bound_is_a_varied_number_of_steps(batch):
    """ε_c = ε + Δε·|τ − q̄_c| (eq. 18, first case), K_c = ⌊ε_c/α⌋ (eq. 19)."""
    u, y = batch
    out, _ = run(pj.lpl(bound=pj.varied(eps=0.2, delta_eps=1.0), step_size=0.1, tau=0.45), u, y)
    q = np.array([softmax(u)[y == c, c].mean() if (y == c).any() else 0.0 for c in range(C)])
    steps = np.floor((0.2 + np.abs(0.45 - q)) / 0.1)
    assert len(set(steps[np.unique(y)])) > 1
    delta = algorithm_2(u, np.eye(C)[y], y, np.where(q <= 0.45, 1, -1), steps, 0.1)
    np.testing.assert_allclose(out.logits, u + delta, rtol=1e-5, atol=1e-6)


def test_split_by_frequency_with_its_varied_bound(batch):
    """The first τ·C classes by count are lowered (eq. 14), ε + Δε·π_c/π_1 there and ε + Δε·π_C/π_c elsewhere (eq. 18)."""
    u, y = batch
    link = pj.lpl(bound=pj.varied_by_frequency(eps=0.2, delta_eps=0.4), step_size=0.1, split="frequency", tau=0.5)
    sign, steps = [1, -1, 1, -1], [4, 6, 6, 4]  # counts 10, 40, 5, 20: 0.2 + 0.4·(5/10, 40/40, 5/5, 20/40)
    out, _ = run(link, u, y)
    np.testing.assert_allclose(out.logits, u + algorithm_2(u, np.eye(C)[y], y, sign, steps, 0.1), rtol=1e-5, atol=1e-6)
    assert (out.metrics["lpl/raised"], out.metrics["lpl/lowered"]) == (2, 2)


def test_a_bound_may_be_a_schedule(batch):
    u, y = batch
    link = pj.lpl(bound=lambda step: 0.1 * (1 + step), step_size=0.1, direction=1.0, max_steps=4)
    made = objective(link)
    for step in (0, 2):
        data = pj.batch(jnp.asarray(u, jnp.float32), y)
        _, out = made(ZERO, made.init(ZERO, data.inputs), data, step=step)
        expected = algorithm_2(u, np.eye(C)[y], y, np.ones(C), [1 + step] * C, 0.1)
        np.testing.assert_allclose(out.logits, u + expected, rtol=1e-5, atol=1e-6)


def test_projection_keeps_each_delta_in_its_ball(batch):
    u, y = 3 * batch[0], batch[1]
    bound = np.array([0.3, 0.9, 0.6, 1.2])
    out, _ = run(pj.lpl(bound=bound, step_size=0.3, direction=SIGN, project=True), u, y)
    free = algorithm_2(u, np.eye(C)[y], y, SIGN, [1, 3, 2, 4], 0.3)
    kept = algorithm_2(u, np.eye(C)[y], y, SIGN, [1, 3, 2, 4], 0.3, radius=bound)
    np.testing.assert_allclose(out.logits, u + kept, rtol=1e-5, atol=1e-5)
    assert (np.linalg.norm(out.logits - u, axis=1) <= bound[y] + 1e-5).all()
    assert (np.linalg.norm(free, axis=1) > bound[y] + 1e-3).any()  # the ball is felt


@pytest.mark.parametrize("order", ["la first", "lpl first"])
def test_with_logit_adjustment_the_search_is_on_the_adjusted_logits(batch, order):
    """One perturbs u + τ log π in either order; the accuracies of a split come from the logits as they reach the link."""
    u, y = batch
    adjusted = u + 1.5 * np.log(COUNTS / COUNTS.sum())
    links = [pj.logit_adjustment(tau=1.5), pj.lpl(bound=0.5, step_size=0.1, split=pj.by_accuracy(tau=0.0), tau=None)]
    out, _ = run(pj.chain(*links[:: 1 if order == "la first" else -1]), u, y)
    delta = algorithm_2(adjusted, np.eye(C)[y], y, -np.ones(C), [5] * C, 0.1)  # τ = 0: every class seen is lowered
    np.testing.assert_allclose(out.losses, cross_entropy(adjusted + delta, np.eye(C)[y]), rtol=1e-5, atol=1e-6)
    alone, _ = run(pj.lpl(bound=0.5, step_size=0.1, direction=-1.0), adjusted, y)
    np.testing.assert_allclose(out.losses, alone.losses, rtol=1e-5, atol=1e-6)
    q = out.states[order == "la first"].mean
    p = softmax(adjusted if order == "la first" else u)
    np.testing.assert_allclose(q, [p[y == c, c].mean() if (y == c).any() else 0 for c in range(C)], rtol=1e-5)


def test_the_residual_uses_mixed_targets(batch):
    u, y = batch
    targets = 0.7 * np.eye(C)[y] + 0.3 * np.eye(C)[y[::-1]]
    out, _ = run(pj.lpl(bound=0.5, step_size=0.1, direction=SIGN), u, y, targets=jnp.asarray(targets, jnp.float32))
    delta = algorithm_2(u, targets, y, SIGN, [5] * C, 0.1)
    np.testing.assert_allclose(out.logits, u + delta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.losses, cross_entropy(u + delta, targets), rtol=1e-5)


def test_behind_mixup_it_perturbs_the_mixed_batch(batch):
    u, y = batch
    chain = pj.chain(pj.mixup(), pj.lpl(bound=0.5, step_size=0.1, direction=SIGN))
    out, _ = run(chain, u, y)
    weight, partner = pj.draw_mixing(jax.random.fold_in(jax.random.key(0), 0), len(y), alpha=1.0)
    weight, partner = float(weight), np.asarray(partner)
    mixed = lambda x: weight * x + (1 - weight) * x[partner]
    delta = algorithm_2(mixed(u), mixed(np.eye(C)[y]), y, SIGN, [5] * C, 0.1)
    np.testing.assert_allclose(out.logits, mixed(u) + delta, rtol=1e-5, atol=1e-5)


def test_the_search_sees_later_label_and_loss_links_but_not_the_weights(batch, float64):
    """With smoothing and focal behind it, one step is the slope of that loss; weights of samples don't enter a class mean."""
    u, y = batch
    chain = pj.chain(pj.lpl(bound=0.1, step_size=0.1, direction=1.0), pj.label_smoothing(weight=0.2), pj.focal(gamma=2.0))
    made = objective(chain)
    weights = jnp.asarray(np.random.default_rng(0).random(len(y)), jnp.float32)
    _, out = made(np.zeros(C), made.init(np.zeros(C), u), pj.batch(u, jnp.asarray(y), weights=weights))
    for c in np.unique(y):
        targets = 0.8 * np.eye(C)[y[y == c]] + 0.05
        focal = lambda v: (1 - softmax(v)[:, c]) ** 2 * cross_entropy(v, targets)
        loss = lambda shift: focal(u[y == c] + shift).mean()
        slope = np.array([(loss(e) - loss(-e)) / 2e-5 for e in 1e-5 * np.eye(C)])
        np.testing.assert_allclose(np.asarray(out.logits - u)[y == c] / 0.1, np.tile(slope, [(y == c).sum(), 1]), atol=1e-8)


def test_no_gradient_leaks_through_the_perturbation(batch, float64):
    """The gradient is that of the loss with δ held fixed, to finite differences: ∂/∂w of mean CE(u + w + δ)."""
    u, y = batch
    made = objective(pj.lpl(bound=0.5, step_size=0.1, direction=SIGN))
    w = np.array([0.3, -0.2, 0.1, 0.4])
    grad, out = jax.grad(made, has_aux=True)(w, made.init(w, u), pj.batch(u, jnp.asarray(y)))
    delta = algorithm_2(u + w, np.eye(C)[y], y, SIGN, [5] * C, 0.1)
    frozen = lambda w: cross_entropy(u + w + delta, np.eye(C)[y]).mean()
    numeric = np.array([(frozen(w + e) - frozen(w - e)) / 2e-6 for e in 1e-6 * np.eye(C)])
    np.testing.assert_allclose(grad, numeric, atol=1e-8)
    leaky = lambda w: cross_entropy(u + w + algorithm_2(u + w, np.eye(C)[y], y, SIGN, [5] * C, 0.1), np.eye(C)[y]).mean()
    through = np.array([(leaky(w + e) - leaky(w - e)) / 2e-6 for e in 1e-6 * np.eye(C)])
    assert np.abs(grad - through).max() > 1e-3


def test_max_steps_changes_nothing_where_it_suffices(batch):
    kw = dict(bound=0.5, step_size=0.1, direction=SIGN)
    out, more = run(pj.lpl(**kw), *batch)[0], run(pj.lpl(max_steps=12, **kw), *batch)[0]
    np.testing.assert_allclose(out.logits, more.logits, rtol=1e-6, atol=1e-6)
    pj.lpl(max_steps=5, **kw)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bound=lambda step: 0.1), "lpl needs max_steps when .* a schedule, got None.*Pass max_steps=10"),
        (dict(bound=5.0, max_steps=3), r"lpl needs max_steps >= floor\(bound / step_size\) = 50, got 3. Pass max_steps=50"),
        (dict(bound=pj.varied(eps=1.0), max_steps=10), "= 20, got 10"),
        (dict(step_size=0.0), "lpl needs step_size > 0, got 0.0"),
        (dict(bound=float("inf")), "lpl needs a finite bound, got inf"),
    ],
)
def test_errors_say_what_to_write(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.lpl(**settings)
    with pytest.raises(ValueError, match=message):
        pj.lpl.resolve_structure(dict(bound=1.0, step_size=0.1, max_steps=None) | settings)


def test_a_negative_bound_is_an_error():
    with pytest.raises(ValueError, match="lpl needs bound >= 0, got -1.0"):
        pj.lpl(bound=-1.0)


def test_a_traced_bound_needs_max_steps():
    u, y = jnp.zeros([2, C]), jnp.array([0, 1])
    delta = lambda bound, **kw: pj.lpl_delta(u, y, direction=1.0, bound=bound, step_size=0.1, **kw)
    with pytest.raises(ValueError, match="lpl needs max_steps"):
        jax.jit(delta)(0.3)
    np.testing.assert_allclose(jax.jit(lambda b: delta(b, max_steps=3))(0.3), delta(0.3), rtol=1e-6)


def test_wrong_shapes_and_dtypes():
    kw = dict(direction=1.0, bound=0.1, step_size=0.1)
    with pytest.raises(ValueError, match=r"logits \[B, C\] and labels \[B\], got \(2, 3, 4\)"):
        pj.lpl_delta(jnp.zeros([2, 3, 4]), jnp.zeros([2], int), **kw)
    with pytest.raises(ValueError, match="integer labels, got float32"):
        pj.lpl_delta(jnp.zeros([2, 3]), jnp.zeros([2]), **kw)
