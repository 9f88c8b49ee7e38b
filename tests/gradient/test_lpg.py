"""perturbjax.gradient.lpg: eqs. 13–15 in numpy, what reaches the parameters, directions, splits, and Proposition 2's term."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

C, B, D = 4, 9, 4
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
COUNTS = np.array([10, 40, 5, 20])
MODEL = {"stage1": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, x: x @ w["b"]}


@pytest.fixture
def problem():
    """Parameters, inputs and labels; the batch size is odd, and class 3 is absent."""
    rng = np.random.default_rng(0)
    params = dict(a=rng.normal(size=(D, D)), b=rng.normal(size=(D, C)))
    return params, rng.normal(size=(B, D)), rng.permutation([0, 0, 0, 1, 1, 1, 1, 2, 2]).astype(np.int32)


@pytest.fixture
def float64():
    with enable_x64(True):
        yield


def forward(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def probabilities(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def run(links, problem, states=None, *, counts=COUNTS, weights=None, **place):
    """(loss, Output, gradients) of one pass."""
    params, x, y = problem
    x = jnp.asarray(x)
    made = pj.objective(MODEL, links, num_classes=C, class_counts=counts)
    states = made.init(params, x) if states is None else states
    batch = pj.batch(x, jnp.asarray(y), weights=weights)
    (loss, out), grads = jax.value_and_grad(made, has_aux=True)(params, states, batch, **place)
    return loss, out, grads


def oracle(h, y, sign, eps, form, clamp):
    """h̃ − h by eqs. 13–15, class by class; absent classes have no samples to change."""
    delta = np.zeros_like(h)
    for c in np.unique(y):
        mean = h[y == c].mean(0)
        amount = sign[c] * eps[c]
        if clamp:
            amount = max(amount, -np.linalg.norm(mean))
        for i in np.flatnonzero(y == c):
            delta[i] = (mean if form == "shift" else h[i]) * amount / np.linalg.norm(mean)
    return delta


def pulled_back(params, x, cotangent):
    """Σ_i J_iᵀ cotangent_i / B: the parameter gradient that belongs to a gradient of the logits."""
    _, pull = jax.vjp(lambda params: forward(params, x), params)
    return pull(jnp.asarray(cotangent / B))[0]


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), dict(a), dict(b))


# ------------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("form", ["shift", "scale"])
@pytest.mark.parametrize("clamp", [True, False])
def test_delta_is_the_paper_s_closed_form(problem, float64, form, clamp):
    params, x, y = problem
    h = probabilities(np.asarray(forward(params, x))) - np.eye(C)[y]
    for eps in (np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 5.0, 0.3, 0.4])):  # 5: further than to zero
        ours = pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), direction=SIGN, bound=eps, form=form, clamp=clamp)
        np.testing.assert_allclose(ours, oracle(h, y, SIGN, eps, form, clamp), rtol=1e-9, atol=1e-12)


def test_clamped_dampening_stops_at_zero_and_the_literal_equation_turns_round(problem, float64):
    _, _, y = problem
    h = np.random.default_rng(5).normal(size=(B, C))
    kw = dict(direction=-1.0, bound=50.0)
    means = lambda delta: np.array([(h + np.asarray(delta))[y == c].mean(0) for c in np.unique(y)])
    original = means(np.zeros_like(h))
    np.testing.assert_allclose(means(pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), **kw)), 0, atol=1e-12)
    np.testing.assert_allclose(h + pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), form="scale", **kw), 0, atol=1e-12)
    literal = means(pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), clamp=False, **kw))
    assert ((literal * original).sum(1) < 0).all()


def test_a_zero_mean_gradient_has_no_direction():
    """Two samples that cancel: nothing to shift along, nothing to scale by, no nan."""
    h, y = jnp.array([[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]]), jnp.array([0, 0, 1])
    for form in ("shift", "scale"):
        np.testing.assert_array_equal(pj.lpg_delta(h, y, direction=1.0, bound=0.1, form=form), 0.0)


def test_the_delta_is_a_constant():
    h, y = jnp.array([[0.5, -0.5], [0.3, -0.3]]), jnp.array([0, 1])
    for form in ("shift", "scale"):
        through = jax.grad(lambda h: (pj.lpg_delta(h, y, direction=1.0, bound=0.1, form=form) ** 2).sum())(h)
        np.testing.assert_array_equal(through, 0.0)


def test_samples_of_no_class_get_nothing():
    h, y = jnp.array([[0.5, -0.5], [0.3, -0.3], [0.2, -0.2]]), jnp.array([0, -1, 2])
    for options in (dict(form="shift"), dict(form="scale"), dict(granularity="sample")):
        delta = jax.jit(lambda h, y: pj.lpg_delta(h, y, direction=1.0, bound=0.1, **options))(h, y)
        np.testing.assert_array_equal(delta[1:], 0.0)
        np.testing.assert_allclose(jnp.linalg.norm(delta[0]), 0.1, rtol=1e-6)


def test_shift_has_the_length_of_the_bound_and_sums_to_zero(problem, float64):
    """δ ∝ h̄, so the closed form never leaves the plane of LPL's gradients (only LPG-PGD does)."""
    params, x, y = problem
    h = probabilities(np.asarray(forward(params, x))) - np.eye(C)[y]
    delta = pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), direction=1.0, bound=0.3)
    np.testing.assert_allclose(np.linalg.norm(delta, axis=1), 0.3, rtol=1e-9)
    np.testing.assert_allclose(delta.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("form", ["shift", "scale"])
@pytest.mark.parametrize("clamp", [True, False])
def test_every_sample_its_own(problem, float64, form, clamp):
    """h_i changes its own length by s_c·ε_c, no further down than to zero if clamped; both forms say the same."""
    params, x, y = problem
    h = probabilities(np.asarray(forward(params, x))) - np.eye(C)[y]
    eps = np.array([0.1, 0.9, 0.3, 0.4])
    ours = pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), direction=SIGN, bound=eps, form=form, clamp=clamp, granularity="sample")
    length = np.linalg.norm(h, axis=1)
    amount = (SIGN * eps)[y]
    assert (amount < -length).any() and (amount > -length).any()
    amount = np.maximum(amount, -length) if clamp else amount
    np.testing.assert_allclose(ours, h * (amount / length)[:, None], rtol=1e-9, atol=1e-12)


def test_samples_with_one_gradient_are_their_class(float64):
    """Where a class's samples agree, its mean is each of them: the two granularities are one."""
    h, y = np.random.default_rng(2).normal(size=(C, C))[[0, 0, 1, 2, 2]], jnp.array([0, 0, 1, 2, 2])
    both = [pj.lpg_delta(jnp.asarray(h), y, direction=SIGN, bound=0.3, granularity=g) for g in ("category", "sample")]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-9)


# ----------------------------------------------------------------------------------------------------- the transform


@pytest.mark.parametrize("form", ["shift", "scale"])
def test_parameters_get_the_perturbed_logit_gradient(problem, float64, form):
    """The gradient is Jᵀ(h + δ)/B by an explicit vjp; the loss is the plain one, bit for bit."""
    params, x, y = problem
    loss, out, grads = run(pj.lpg(bound=0.3, form=form, direction=SIGN), problem)
    h = probabilities(np.asarray(forward(params, x))) - np.eye(C)[y]
    delta = oracle(h, y, SIGN, np.full(C, 0.3), form, True)
    assert_close(grads, pulled_back(params, x, h + delta), rtol=1e-6, atol=1e-8)  # the bound is a float32 setting
    plain, plain_out, _ = run((), problem)
    np.testing.assert_array_equal(loss, plain)
    np.testing.assert_array_equal(out.losses, plain_out.losses)
    np.testing.assert_array_equal(out.logits, plain_out.logits)


def test_after_smoothing_and_focal_with_sample_weights(problem, float64):
    """h is the gradient of the losses as they end up, before weights and 1/B; then w_i·(h_i + δ_i)/B flows back."""
    params, x, y = problem
    weights = np.random.default_rng(3).random(B)
    weights[0] = 0.0
    chain = pj.chain(pj.lpg(bound=0.2, direction=SIGN), pj.focal(gamma=2.0), pj.label_smoothing(weight=0.2))
    loss, _, grads = run(chain, problem, weights=jnp.asarray(weights))
    u, targets = np.asarray(forward(params, x)), 0.8 * np.eye(C)[y] + 0.2 / C

    def losses(u):
        p = probabilities(u)
        return (1 - p[np.arange(B), y]) ** 2 * -(targets * np.log(p)).sum(1)

    h = np.stack([(losses(u + e) - losses(u - e)) / 2e-6 for e in 1e-6 * np.eye(C)], axis=1)
    delta = oracle(h, y, SIGN, np.full(C, 0.2), "shift", True)
    np.testing.assert_allclose(loss, (weights * losses(u)).mean(), rtol=1e-9)
    assert_close(grads, pulled_back(params, x, weights[:, None] * (h + delta)), rtol=1e-5, atol=1e-8)


def test_mixed_targets_enter_the_logit_gradient(problem, float64):
    params, x, y = problem
    targets = 0.7 * np.eye(C)[y] + 0.3 * np.eye(C)[y[::-1]]
    made = pj.objective(MODEL, pj.lpg(bound=0.2, direction=SIGN), num_classes=C)
    batch = pj.batch(x, jnp.asarray(y), targets=jnp.asarray(targets))
    grads, _ = jax.grad(made, has_aux=True)(params, made.init(params, x), batch)
    h = probabilities(np.asarray(forward(params, x))) - targets
    delta = oracle(h, y, SIGN, np.full(C, 0.2), "shift", True)
    assert_close(grads, pulled_back(params, x, h + delta), rtol=1e-6, atol=1e-8)


def test_behind_lpl_the_gradient_at_the_perturbed_logits_is_perturbed(problem, float64):
    params, x, y = problem
    chain = pj.chain(pj.lpl(bound=0.3, step_size=0.3, direction=SIGN), pj.lpg(bound=0.2, direction=SIGN))
    _, out, grads = run(chain, problem)
    h = probabilities(np.asarray(out.logits)) - np.eye(C)[y]
    delta = oracle(h, y, SIGN, np.full(C, 0.2), "shift", True)
    assert_close(grads, pulled_back(params, x, h + delta), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["shift", "scale"])
def test_plus_grows_and_minus_shrinks_the_class_s_gradient(problem, form):
    """Conjectures 1 and 2: ‖mean h̃‖ against ‖mean h‖, by exactly ε where nothing is clamped."""
    params, x, y = problem
    h = jnp.asarray(probabilities(np.asarray(forward(params, x))) - np.eye(C)[y], jnp.float32)
    norm = lambda h: np.array([np.linalg.norm(np.asarray(h)[y == c].mean(0)) for c in np.unique(y)])
    for sign in (1.0, -1.0):
        after = norm(h + pj.lpg_delta(h, jnp.asarray(y), direction=sign, bound=0.05, form=form))
        np.testing.assert_allclose(after, norm(h) + sign * 0.05, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- splits, and the term


def test_accuracy_is_top_1_over_whole_epochs(problem):
    """First epoch: plain gradients. Then +1 where last epoch's accuracy is below the mean over classes, −1 where not (eq. 18)."""
    params, x, y = problem
    plain, states = run((), problem)[2], None
    for step in range(3):
        _, out, grads = run(pj.lpg(bound=0.2), problem, states, epoch=jnp.int32(step // 2))
        states = out.states
        if step < 2:
            assert_close(grads, plain, rtol=1e-5, atol=1e-7)
            assert (out.metrics["lpg/raised"], out.metrics["lpg/lowered"]) == (0, 0)
    u = np.asarray(forward(params, x))
    accuracy, present = np.zeros(C), np.unique(y)
    for c in present:
        accuracy[c] = (u.argmax(1) == y)[y == c].mean()
    sign = np.zeros(C)
    sign[present] = np.where(accuracy[present] < accuracy[present].mean(), 1, -1)
    h = probabilities(u) - np.eye(C)[y]
    delta = oracle(h, y, sign, np.full(C, 0.2), "shift", True)
    assert_close(grads, pulled_back(params, x, (h + delta).astype(np.float32)), rtol=1e-4, atol=1e-5)
    assert (out.metrics["lpg/raised"], out.metrics["lpg/lowered"]) == ((sign > 0).sum(), (sign < 0).sum())


def test_frequency_is_the_count_against_the_median(problem):
    """N_c < τ is amplified, N_c ≥ τ dampened, τ the median count (eq. 19): of 5, 10, 10, 40 only the first is below."""
    counts = np.array([5, 10, 10, 40])
    _, out, grads = run(pj.lpg(bound=0.2, split="frequency"), problem, counts=counts)
    _, _, same = run(pj.lpg(bound=0.2, direction=np.array([1.0, -1.0, -1.0, -1.0])), problem)
    assert_close(grads, same, rtol=1e-5, atol=1e-7)
    assert (out.metrics["lpg/raised"], out.metrics["lpg/lowered"]) == (1, 3)


def test_scattered_classes_are_dampened(problem):
    """Var(h_c) = mean ‖h_i − h̄_c‖² over the last epoch, above its mean over the classes: −1 (eq. 20)."""
    params, x, y = problem
    states = None
    for epoch in range(2):
        _, out, grads = run(pj.lpg(bound=0.2, split="variance"), problem, states, epoch=jnp.int32(epoch))
        states = out.states
    h, present = probabilities(np.asarray(forward(params, x))) - np.eye(C)[y], np.unique(y)
    spread = np.array([(np.linalg.norm(h[y == c] - h[y == c].mean(0), axis=1) ** 2).mean() for c in present])
    sign = np.zeros(C)
    sign[present] = np.where(spread > spread.mean(), -1, 1)
    delta = oracle(h, y, sign, np.full(C, 0.2), "shift", True)
    assert_close(grads, pulled_back(params, x, (h + delta).astype(np.float32)), rtol=1e-4, atol=1e-5)


def test_the_bound_term_of_proposition_2_is_logged(problem):
    """Σ_c (N_c/N)·ε_c, with the training set's counts, or the batch's where these are unknown."""
    eps = np.array([0.1, 0.2, 0.4, 0.3])
    _, out, _ = run(pj.lpg(bound=eps, direction=SIGN), problem)
    np.testing.assert_allclose(out.metrics["lpg/bound_term"], (COUNTS / COUNTS.sum() * eps).sum(), rtol=1e-6)
    _, out, _ = run(pj.lpg(bound=eps, direction=SIGN), problem, counts=None)
    share = np.bincount(problem[2], minlength=C) / B
    np.testing.assert_allclose(out.metrics["lpg/bound_term"], (share * eps).sum(), rtol=1e-6)


def test_varied_bound_by_frequency(problem):
    """ε_c = ε + Δε·|τ − s_c| (eq. 21) with ranks: s = (3, 1, 4, 2)/4, τ the place of the median, a half."""
    _, out, _ = run(pj.lpg(bound=pj.varied(eps=0.1, delta_eps=0.3), split="frequency"), problem)
    eps = 0.1 + 0.3 * np.abs(0.5 - np.array([3, 1, 4, 2]) / 4)
    np.testing.assert_allclose(out.metrics["lpg/bound_term"], (COUNTS / COUNTS.sum() * eps).sum(), rtol=1e-6)


def batch_statistics(kind, problem):
    """What a split keeps of one batch, by class: sums [C, k] and counts [C]."""
    params, x, y = problem
    u = np.asarray(forward(params, x))
    if kind == "variance":
        h = probabilities(u) - np.eye(C)[y]
        values = np.concatenate([h, (h**2).sum(1, keepdims=True)], axis=1)
    elif kind == "top1":
        values = (u.argmax(1) == y)[:, None].astype(float)
    else:
        values = probabilities(u)[np.arange(B), y][:, None]
    member = np.eye(C)[y]
    return member.T @ values, member.sum(0)


def running(kind, problems, epochs, update):
    """(statistic [C], seen [C]) in use at the last step: an average over steps (decay 0.9), or the mean over the last whole epoch."""
    kept, seen = None, np.zeros(C, bool)
    if update == "step":
        for one in problems:
            total, count = batch_statistics(kind, one)
            now, here = total / np.maximum(count, 1)[:, None], count > 0
            kept = now if kept is None else kept
            moved = np.where(seen[:, None], 0.9 * kept + 0.1 * now, now)
            kept, seen = np.where(here[:, None], moved, kept), seen | here
    else:
        found = [batch_statistics(kind, one) for one, epoch in zip(problems, epochs) if epoch == epochs[-1] - 1]
        total, count = (sum(part) for part in zip(*found))
        kept, seen = total / np.maximum(count, 1)[:, None], count > 0
    return (kept[:, -1] - (kept[:, :-1] ** 2).sum(1) if kind == "variance" else kept[:, 0]), seen


# Thresholds with classes on both sides in the test below.
NUMBERS = {"step": dict(probability=0.28, top1=0.08, variance=0.13), "epoch": dict(probability=0.28, top1=0.2, variance=0.13)}


@pytest.mark.parametrize("update", ["step", "epoch"])
@pytest.mark.parametrize("tau", ["mean", "median", "number"])
@pytest.mark.parametrize("kind", ["probability", "top1", "variance"])
def test_each_split_statistic_threshold_and_varied_bound_can_be_set(problem, kind, tau, update):
    """Steps in the epochs 0, 0, 1 on different batches: the same step as with direction and bound worked out in numpy."""
    tau = NUMBERS[update][kind] if tau == "number" else tau
    params, _, y = problem
    rng = np.random.default_rng(11)
    problems = [(params, rng.normal(size=(B, D)), rng.permutation(y)) for _ in range(3)]
    made = f"by_variance(tau={tau}, update={update})" if kind == "variance" else f"by_accuracy({tau}, {kind}, {update})"
    text = f"lpg(bound=varied(0.1, 0.4), split={made})"
    structure, numbers = spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())
    [link] = spec.build(structure, numbers, taxonomy.registry(), taxonomy.helpers())
    states = None
    for one, epoch in zip(problems, (0, 0, 1)):
        _, out, grads = run(link, one, states, epoch=jnp.int32(epoch))
        states = out.states
    statistic, seen = running(kind, problems, (0, 0, 1), update)
    threshold = {"mean": statistic[seen].mean(), "median": np.median(statistic[seen])}.get(tau, tau)
    raised = {"variance": statistic <= threshold, "top1": statistic < threshold}.get(kind, statistic <= threshold)
    sign = np.where(seen, np.where(raised, 1.0, -1.0), 0.0)
    top = statistic.max() if kind == "variance" else 1.0
    eps = 0.1 + 0.4 * np.abs(np.clip(threshold / top, 0, 1) - statistic / top)
    _, expected_out, expected = run(pj.lpg(bound=jnp.asarray(eps, jnp.float32), direction=sign), problems[-1])
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)
    for name in ("lpg/raised", "lpg/lowered", "lpg/bound_term"):
        np.testing.assert_allclose(out.metrics[name], expected_out.metrics[name], rtol=1e-4)
    assert (sign > 0).any() and (sign < 0).any()


@pytest.mark.parametrize("name", ["accuracy", "variance", "frequency"])
def test_by_name_the_splits_are_the_paper_s(problem, name):
    """Over whole epochs: top-1 accuracy, variance of the logit gradient, counts against the median; tau comes with the name."""
    split = {
        "accuracy": lambda tau: pj.by_accuracy(measure="top1", update="epoch", tau=tau),
        "variance": lambda tau: pj.by_variance(update="epoch", tau=tau),
        "frequency": lambda tau: pj.by_frequency(rule="count", tau=tau),
    }[name]
    for tau in ("median", 12.0 if name == "frequency" else 0.35):
        states = others = None
        for epoch in range(2):
            _, out, grads = run(pj.lpg(bound=0.2, split=name, tau=tau), problem, states, epoch=jnp.int32(epoch))
            _, other, same = run(pj.lpg(bound=0.2, split=split(tau)), problem, others, epoch=jnp.int32(epoch))
            states, others = out.states, other.states
        assert_close(grads, same, rtol=0, atol=0)
        assert int(out.metrics["lpg/raised"]) + int(out.metrics["lpg/lowered"]) == (4 if name == "frequency" else 3)


@pytest.mark.optax_promotes
@pytest.mark.parametrize("settings", [dict(), dict(inference="pgd", jacobian="full"), dict(granularity="sample")], ids=str)
def test_a_curriculum_over_the_bound_is_a_schedule_of_the_step(problem, settings):
    """One compiled step serves all of it; at step k it is the step with the bound ε(k), in PGD its step size 2ε(k)/T too."""
    params, x, y = problem
    schedule = optax.linear_schedule(0.0, 0.5, transition_steps=4)
    made = pj.objective(MODEL, pj.lpg(bound=schedule, direction=SIGN, **settings), num_classes=C)
    states, traces = made.init(params, jnp.asarray(x)), []

    @jax.jit
    def gradient(step):
        traces.append(1)
        return jax.grad(made, has_aux=True)(params, states, pj.batch(x, jnp.asarray(y)), step=step)[0]

    plain = run((), problem)[2]
    assert_close(gradient(jnp.int32(0)), plain, rtol=1e-5, atol=1e-6)
    for step, bound in ((2, 0.25), (4, 0.5), (9, 0.5)):
        _, _, fixed = run(pj.lpg(bound=bound, direction=SIGN, **settings), problem)
        assert_close(gradient(jnp.int32(step)), fixed, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="lpg needs form to be one of its names, got 'shrink'"):
        pj.lpg(form="shrink")
    with pytest.raises(ValueError, match="lpg needs bound >= 0, got -1"):
        pj.lpg(bound=-1.0)
    with pytest.raises(ValueError, match=r"lpg_delta needs logits \[B, C\] and labels \[B\], got \(4, 3\) and \(3,\)"):
        pj.lpg_delta(jnp.zeros([4, 3]), jnp.zeros([3], int), direction=1.0, bound=0.1)
    with pytest.raises(ValueError, match="lpg needs 'class_counts'"):
        pj.objective(MODEL, pj.lpg(split="frequency"), num_classes=C)
