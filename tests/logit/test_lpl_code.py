"""What the authors' code of LPL does otherwise than the paper: each switch against that code's rules, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy
from perturbjax.logit.lpl_steps import class_steps, head_tail_steps, largest_steps, proportional_steps

C, COUNTS = 4, np.array([10, 40, 5, 20])
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
MODEL = pj.line(lambda w, u: u + w[None])  # the inputs are the logits
CIFAR10_LT = {
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
}
BALANCED = dict(split=pj.by_accuracy(update="batch", over="all"), normalize="column", sign="each_step")
LONG_TAIL = dict(split="frequency", tau=0.5, normalize="column", gradient="through")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def data(seed, classes=C):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=2.0, size=(13, C)), rng.integers(0, classes, 13).astype(np.int32)


def softmax(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(u, y):
    return -np.log(softmax(u)[np.arange(len(y)), y])


def as_coded(u, y, alpha, places, *, sign=None, twice=False, norm="column"):
    """The code, class by class: P [C, C] mean softmax rows (zero for an absent class), G = P − I, row c over the norm of column c;
    everything walks on, the snapshot taken after the (0-based) place of each class is kept. sign=None: sign(τ − P_cc), each time."""
    u, snapshots = u.copy(), []
    for _ in range(max(places) + 1):
        p = softmax(u)
        mean = np.array([p[y == c].mean(0) if (y == c).any() else np.zeros(C) for c in range(C)])
        g = mean - np.eye(C)
        g = g / {"none": 1, "column": np.linalg.norm(g, axis=0)[:, None], "row": np.linalg.norm(g, axis=1)[:, None]}[norm]
        s = np.sign(np.diag(mean).mean() - np.diag(mean)) if sign is None else sign
        step = (alpha * s[:, None] * g)[y]
        snapshots.append(u + step)
        u = u + (2 * step if twice else step)
    return np.array([snapshots[places[c]][i] for i, c in enumerate(y)])


def run(link, u, y, w=None, **fields):
    """(Output, gradient with respect to a shift of the logits) of one pass."""
    made, w = pj.objective(MODEL, link, num_classes=C, class_counts=COUNTS), np.zeros(C) if w is None else w
    grad, out = jax.grad(made, has_aux=True)(w, made.init(w, u), pj.batch(jnp.asarray(u), jnp.asarray(y)), **fields)
    return out, grad


@pytest.mark.parametrize("classes", [C, C - 1])
@pytest.mark.parametrize("norm", ["none", "row", "column"])
def test_each_class_step_is_divided_by_the_norm_asked_for(norm, classes):
    u, y = data(0, classes)
    ours = pj.lpl_delta(jnp.asarray(u), jnp.asarray(y), direction=SIGN, bound=0.9, step_size=0.3, normalize=norm)
    np.testing.assert_allclose(u + ours, as_coded(u, y, 0.3, [2] * C, sign=SIGN, norm=norm), rtol=1e-9, atol=1e-12)
    out, _ = run(pj.lpl(bound=0.9, step_size=0.3, direction=SIGN, normalize=norm), u, y)
    np.testing.assert_allclose(out.logits, u + ours, rtol=1e-9, atol=1e-12)


def test_a_row_step_has_length_alpha_and_a_column_step_need_not():
    u, y = data(0)
    length = lambda norm: np.linalg.norm(
        pj.lpl_delta(jnp.asarray(u), jnp.asarray(y), direction=1.0, bound=0.3, step_size=0.3, normalize=norm), axis=1
    )
    np.testing.assert_allclose(length("row"), 0.3, rtol=1e-9)
    assert np.ptp(length("column")) > 0.05


def test_with_column_norms_a_class_that_has_done_its_steps_walks_on_for_the_others():
    u, y = data(1)
    places = [3, 1, 0, 2]
    out, _ = run(pj.lpl(num_steps=np.array(places) + 1.0, step_size=0.3, direction=SIGN, normalize="column"), u, y)
    np.testing.assert_allclose(out.logits, as_coded(u, y, 0.3, places, sign=SIGN), rtol=1e-9)


def test_a_perfect_class_has_no_step():
    u, y = np.diag([1e4] * C), np.arange(C, dtype=np.int32)
    for norm in ("row", "column"):
        ours = pj.lpl_delta(jnp.asarray(u), jnp.asarray(y), direction=1.0, bound=0.3, step_size=0.3, normalize=norm)
        np.testing.assert_array_equal(ours, 0)


@pytest.mark.parametrize("seed, classes", [(19, C), (35, C - 1)])
def test_balanced_script_with_a_fixed_bound(seed, classes):
    """20 steps of α 0.005 there; the sign is asked at every step, τ is the mean over all C. Larger here, so that a sign changes."""
    u, y = data(seed, classes)
    out, grad = run(pj.lpl(num_steps=20, step_size=0.1, **BALANCED), u, y)
    np.testing.assert_allclose(out.logits, as_coded(u, y, 0.1, [19] * C), rtol=1e-6)
    p = softmax(np.asarray(out.logits)) - np.eye(C)[y]
    np.testing.assert_allclose(grad, p.mean(0), rtol=1e-6)  # the perturbation is detached
    fixed, _ = run(pj.lpl(num_steps=20, step_size=0.1, **BALANCED | dict(sign="fixed")), u, y)
    assert np.abs(fixed.logits - out.logits).max() > 1e-2


@pytest.mark.parametrize("most, base", [(10, 0), (4, 40)])
def test_balanced_script_with_a_varied_bound(most, base):
    """Places proportional to |τ − P_cc| within each sign group; every step but the last one counts twice."""
    u, y = data(3)
    p = softmax(u)
    mean = np.array([p[y == c, c].mean() for c in range(C)])
    gap = mean.mean() - mean
    places = [base + max(round(g / (gap.min() if g < 0 else gap.max()) * most - 1), 0) for g in gap]
    assert len(set(places)) > 2 and max(places) == base + most - 1
    rule = proportional_steps(most=most, base=base, counted="twice")
    out, _ = run(pj.lpl(num_steps=rule, step_size=0.01, **BALANCED), u, y)
    np.testing.assert_allclose(out.logits, as_coded(u, y, 0.01, places, twice=True), rtol=1e-6)
    once, _ = run(pj.lpl(num_steps=proportional_steps(most=most, base=base), step_size=0.01, **BALANCED), u, y)
    np.testing.assert_allclose(once.logits, as_coded(u, y, 0.01, places), rtol=1e-6)


@pytest.mark.parametrize("ratio, steps", [(100, [6, 4, 2, 1, 1, 1, 2, 4, 6, 10]), (10, [6, 5, 4, 3, 3, 4, 5, 6, 8, 10])])
def test_head_tail_steps_of_cifar10_lt(ratio, steps):
    split, context = pj.by_frequency(tau=0.4), pj.Context(num_classes=10, class_counts=jnp.asarray(CIFAR10_LT[ratio]))
    got = class_steps(head_tail_steps(most=10, head=0.6), split=split, state=(), context=context)
    np.testing.assert_array_equal(got, steps)


def test_head_tail_steps_of_cifar100_lt():
    counts = [int(500 * 100 ** (-c / 99)) for c in range(100)]
    context = pj.Context(num_classes=100, class_counts=jnp.asarray(counts))
    for tau, most in ((0.4, 40), (0.27, 50)):
        rule = head_tail_steps(most=most, head=0.2)
        got = np.asarray(class_steps(rule, split=pj.by_frequency(tau=tau), state=(), context=context))
        head = [max(round(n / 500 * most * 0.2 - 1), 0) + 1 for n in counts[: round(100 * tau)]]
        tail = [max(round(counts[-1] / n * most - 1), 0) + 1 for n in counts[round(100 * tau) :]]
        np.testing.assert_array_equal(got, head + tail)
        assert got[0] == 0.2 * most and got[-1] == most == largest_steps(rule)


def test_long_tail_script_has_gradients_through_its_steps():
    """Steps by the counts, signs by the counts' order, and the outer gradient differentiates every softmax: finite differences."""
    u, y = data(4)
    link = lambda **more: pj.lpl(num_steps=head_tail_steps(most=5, head=0.6), step_size=0.15, **LONG_TAIL | more)
    places = [max(round(x), 0) for x in (5 / 10 * 5 - 1, 5 * 0.6 - 1, 5 - 1, 20 / 40 * 5 * 0.6 - 1)]  # classes 1 and 3 are head
    w = np.array([0.3, -0.2, 0.1, 0.4])
    coded = lambda w: as_coded(u + w, y, 0.15, places, sign=SIGN)
    out, grad = run(link(), u, y, w)
    np.testing.assert_allclose(out.logits, coded(w), rtol=1e-6)
    difference = lambda loss: np.array([(loss(w + e) - loss(w - e)) / 2e-6 for e in 1e-6 * np.eye(C)])
    np.testing.assert_allclose(grad, difference(lambda w: cross_entropy(coded(w), y).mean()), atol=1e-7)
    out, grad = run(link(gradient="stop"), u, y, w)
    delta = coded(w) - u - w
    np.testing.assert_allclose(out.logits, coded(w), rtol=1e-6)
    np.testing.assert_allclose(grad, difference(lambda w: cross_entropy(u + w + delta, y).mean()), atol=1e-7)


def test_gradients_through_the_paper_s_steps_too():
    u, y = data(5)
    w = np.array([0.3, -0.2, 0.1, 0.4])
    coded = lambda w: as_coded(u + w, y, 0.2, [2] * C, sign=SIGN, norm="none")
    _, grad = run(pj.lpl(bound=0.6, step_size=0.2, direction=SIGN, gradient="through"), u, y, w)
    loss = lambda w: cross_entropy(coded(w), y).mean()
    np.testing.assert_allclose(grad, [(loss(w + e) - loss(w - e)) / 2e-6 for e in 1e-6 * np.eye(C)], atol=1e-7)


def test_adjustment_first_is_the_code_and_perturbation_first_the_other_order():
    u, y = data(6)
    prior = 1.5 * np.log(COUNTS / COUNTS.sum())
    kw = dict(bound=0.6, step_size=0.2, direction=SIGN)
    found = lambda *links: np.asarray(run(pj.chain(*links), u, y)[0].logits)
    la = pj.logit_adjustment(tau=1.5)
    coded = lambda u: as_coded(u, y, 0.2, [2] * C, sign=SIGN, norm="none")
    np.testing.assert_allclose(found(la, pj.lpl(**kw)), coded(u + prior), rtol=1e-9)
    np.testing.assert_allclose(found(la, pj.lpl(**kw, search="alone")), coded(u + prior), rtol=1e-9)
    np.testing.assert_allclose(found(pj.lpl(**kw, search="alone"), la), coded(u) + prior, rtol=1e-9)
    np.testing.assert_allclose(
        found(pj.lpl(**kw), la), coded(u + prior), rtol=1e-9
    )  # the paper: the sum is what is searched on


def test_isda_first_and_lpl_on_the_shifted_logits():
    """ISDA + LPL: the class shift of ISDA, then LPL's steps on top."""
    rng, (_, y) = np.random.default_rng(0), data(7)
    model = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a @ w.T}, head=lambda w: (w, jnp.zeros(C)))
    w = rng.normal(size=(C, 3))
    x = rng.normal(size=(len(y), 3))
    logits = lambda links: pj.objective(model, links, num_classes=C)
    isda = logits(pj.isda(strength=0.5))
    shifted = np.asarray(isda(w, isda.init(w, x), pj.batch(x, y), progress=0.8)[1].logits)
    assert np.abs(shifted - x @ w.T).max() > 1e-2
    both = logits(pj.chain(pj.isda(strength=0.5), pj.lpl(bound=0.6, step_size=0.2, direction=SIGN)))
    out = both(w, both.init(w, x), pj.batch(x, y), progress=0.8)[1]
    np.testing.assert_allclose(out.logits, as_coded(shifted, y, 0.2, [2] * C, sign=SIGN, norm="none"), rtol=1e-9)


def test_the_ball_holds_the_code_s_walk_too():
    u, y = data(8)
    bound = np.array([0.3, 0.5, 0.2, 0.4])
    out, _ = run(pj.lpl(bound=bound, num_steps=8, step_size=0.2, direction=SIGN, normalize="column", project=True), u, y)
    length = np.linalg.norm(out.logits - u, axis=1)
    assert (length <= bound[y] + 1e-6).all() and (length > 0.99 * bound[y]).any()


def test_number_and_size_of_steps_per_class():
    u, y = data(9)
    steps, alpha = np.array([3, 0, 1, 2]), np.array([0.1, 0.2, 0.3, 0.4])
    expected = u.copy()
    for c in range(C):
        one = as_coded(u, y, alpha[c], [max(steps[c] - 1, 0)] * C, sign=SIGN, norm="none")
        expected[y == c] = one[y == c] if steps[c] else u[y == c]
    for given in (dict(num_steps=steps), dict(bound=steps * alpha), dict(num_steps=steps + 0.5)):
        for more in ({}, dict(gradient="through")):
            out, _ = run(pj.lpl(step_size=alpha, direction=SIGN, **given, **more), u, y)
            np.testing.assert_allclose(out.logits, expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [BALANCED | dict(num_steps=proportional_steps(counted="twice")), LONG_TAIL])
def test_devices_share_class_means_norms_and_signs(settings):
    u, y = data(10)
    u, y = u[:12], y[:12]
    mesh, P = (
        jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]),
        jax.sharding.PartitionSpec,
    )

    def logits(u, y, axis_name=None):
        made = pj.objective(MODEL, pj.lpl(step_size=0.1, **settings), num_classes=C, class_counts=COUNTS, axis_name=axis_name)
        return jax.grad(lambda w: made(w, made.init(w, u), pj.batch(u, y))[0])(jnp.zeros(C)), made(
            jnp.zeros(C), made.init(jnp.zeros(C), u), pj.batch(u, y)
        )[1].logits

    def per_device(u, y):
        grad, found = logits(u, y, "d")
        return jax.lax.pmean(grad, "d"), found

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=(P(), P("d")), check_vma=False)
    for one, four in zip(logits(jnp.asarray(u), jnp.asarray(y)), jax.jit(mapped)(u, y)):
        np.testing.assert_allclose(four, one, rtol=1e-6, atol=1e-9)


HELPERS = taxonomy.helpers() | dict(head_tail_steps=head_tail_steps, proportional_steps=proportional_steps)


@pytest.mark.parametrize(
    "text, steps",
    [
        ("lpl(num_steps=head_tail_steps(40, head=0.2), step_size=0.01, split=by_frequency(0.4), normalize=column)", 40),
        ("lpl(num_steps=proportional_steps(4, base=40, counted=twice), split=by_accuracy(update=batch, over=all))", 80),
        ("lpl(num_steps=[6, 4, 2, 1], step_size=[0.1, 0.2, 0.3, 0.4])", 10),
        ("lpl(num_steps=12)", 20),
    ],
)
def test_on_the_command_line_numbers_are_traced_and_the_loop_s_length_is_known(text, steps):
    registry = taxonomy.registry()
    structure, numbers = spec.split_numbers(spec.parse_chain(text), registry, HELPERS)
    assert dict(structure[0].kwargs)["max_steps"] == steps
    u, y = data(11)

    @jax.jit
    def losses(numbers):
        [link] = spec.build(structure, numbers, registry, HELPERS)
        return run(link, u, y)[0].losses

    assert np.isfinite(losses(jnp.asarray(numbers, jnp.float32))).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(normalize="columns"), "lpl needs normalize .* got 'columns'. Did you mean 'column'"),
        (dict(sign="each"), "lpl needs sign .* got 'each'"),
        (dict(gradient="on"), "lpl needs gradient .* got 'on'"),
        (dict(search="la"), "lpl needs search .* got 'la'"),
        (dict(num_steps=-1), "lpl needs num_steps >= 0, got -1"),
        (dict(num_steps=12, max_steps=11), "lpl needs max_steps >= .* = 12, got 11. Pass max_steps=12"),
        (dict(num_steps=proportional_steps(most=4, base=40), max_steps=10), "= 44, got 10"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.lpl(**settings)


def test_wrong_rules_and_what_they_need():
    with pytest.raises(ValueError, match="head_tail_steps needs most >= 1, got 0"):
        head_tail_steps(most=0)
    with pytest.raises(ValueError, match="proportional_steps needs base >= 0, got -1"):
        proportional_steps(base=-1)
    with pytest.raises(ValueError, match="proportional_steps needs counted .* got 'three'"):
        proportional_steps(counted="three")
    with pytest.raises(ValueError, match="lpl needs 'class_counts', got none"):
        pj.objective(MODEL, pj.lpl(num_steps=head_tail_steps(), direction=1.0), num_classes=C)


def test_logits_that_are_not_finite_are_found_where_they_can_be_seen():
    u, y = data(0)
    u[3, 1] = np.nan
    kw = dict(direction=1.0, bound=0.1, step_size=0.1)
    with pytest.raises(ValueError, match=r"lpl_delta needs finite logits, got nan at \[3, 1\]"):
        pj.lpl_delta(jnp.asarray(u), jnp.asarray(y), **kw)
    jax.jit(lambda u: pj.lpl_delta(u, jnp.asarray(y), **kw))(u)
