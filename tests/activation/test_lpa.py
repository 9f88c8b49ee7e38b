"""perturbjax.activation.lpa: LPL at the logits, a numpy oracle at a hidden site, the ball, what reruns, and the statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, D = 4, 9, 4
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
quick = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run
COUNTS = np.array([10, 40, 5, 20])
PIECES = {
    "stage1": lambda w, x: x @ w["a"],
    "stage2": lambda w, x: jnp.tanh(x) @ w["b"],
    "logits": lambda w, x: jnp.tanh(x) @ w["c"],
}


@pytest.fixture
def problem():
    """Parameters, inputs and labels; class 3 is absent from the batch."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(D, n)) for name, n in (("a", D), ("b", D), ("c", C))}
    return params, rng.normal(size=(B, D)), rng.permutation([0, 0, 0, 1, 1, 1, 1, 2, 2]).astype(np.int32)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def see(site="stage1"):
    """A link that reports the value at a site, perturbed by the links before it."""
    return pj.Perturbation(site, lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")


def objective(links, model=PIECES):
    return pj.objective(model, links, num_classes=C, class_counts=COUNTS)


def run(links, problem, states=None, **place):
    """(Output, gradients) of one pass."""
    params, x, y = problem
    made = objective(links)
    states = made.init(params, x) if states is None else states
    grads, out = jax.grad(made, has_aux=True)(params, states, pj.batch(x, jnp.asarray(y)), **place)
    return out, grads


def logits_of(params, hidden):
    """Of the value at stage1."""
    return np.tanh(np.tanh(hidden) @ params["b"]) @ params["c"]


def probabilities(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def slope(params, hidden, y):
    """∂ℓ/∂(value at stage1) of every sample, by the chain rule."""
    first, second = np.tanh(hidden), np.tanh(np.tanh(hidden) @ params["b"])
    h = probabilities(second @ params["c"]) - np.eye(C)[y]
    return (h @ params["c"].T * (1 - second**2)) @ params["b"].T * (1 - first**2)


def oracle(params, x, y, *, sign, radius, rate, steps=3, step="unit", project=True):
    """Algorithm 1, lines 9–15, class by class: the deltas [C, D]."""
    hidden, delta = x @ params["a"], np.zeros((C, D))
    for c in np.unique(y):
        for _ in range(steps):
            mean = slope(params, hidden[y == c] + delta[c], y[y == c]).mean(0)
            direction = {"unit": mean / np.linalg.norm(mean), "raw": mean, "sign": np.sign(mean)}[step]
            delta[c] += sign[c] * rate[c] * direction
            if project:
                delta[c] *= min(1, radius[c] / np.linalg.norm(delta[c]))
    return delta


def test_at_the_logits_with_raw_steps_it_is_lpl(problem):
    """step="raw", project=False, γ = 1 and K steps of κ = α: the same losses, gradients and statistics."""
    split = pj.by_accuracy()
    lpa = pj.lpa(site="logits", step="raw", project=False, beta=1.0, step_size=0.2, num_steps=4, split=split)
    a, b = run(lpa, problem), run(pj.lpl(bound=0.8, step_size=0.2, split=split), problem)
    np.testing.assert_allclose(a[0].losses, b[0].losses, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), (a[1], a[0].states), (b[1], b[0].states))
    assert np.abs(a[0].losses - run((), problem)[0].losses).max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(step="raw", step_size=0.5), dict(step="sign", num_steps=2), dict(project=False, num_steps=5, step_size=0.2)],
)
def test_hidden_deltas_are_those_of_the_oracle(problem, float64, settings):
    """κ_c = 2ε_c/T unless given; the bound at stage 1 of two is β² ε_c (eq. 15)."""
    params, x, y = problem
    eps = np.array([0.5, 0.8, 0.3, 0.4])
    link = pj.lpa(bound=eps, site="stage1", beta=0.7, direction=SIGN, **settings)
    out, _ = run(pj.chain(link, see()), problem)
    radius, steps = 0.49 * eps, settings.get("num_steps", 3)
    rate = np.broadcast_to(settings.get("step_size", 2 * radius / steps), C)
    how = dict(step=settings.get("step", "unit"), project=settings.get("project", True), steps=steps)
    delta = oracle(params, x, y, sign=SIGN, radius=radius, rate=rate, **how)
    # Bounds are float32 settings: their rounding, 6e-8, is what is left.
    np.testing.assert_allclose(out.metrics["seen/value"] - x @ params["a"], delta[y], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(out.logits, logits_of(params, x @ params["a"] + delta[y]), rtol=1e-6)


def test_delta_stays_in_the_layer_s_ball(problem):
    """‖δ_c‖ ≤ γ_l ε_c with γ_l = β^(L−l); three steps of 2ε/3 reach the sphere, or nearly."""
    params, x, y = problem
    clean = {"input": x, "stage1": x @ params["a"]}
    clean["stage2"] = np.tanh(clean["stage1"]) @ params["b"]
    clean["logits"] = np.tanh(clean["stage2"]) @ params["c"]
    for site, power in (("input", 3), ("stage1", 2), ("stage2", 1), ("logits", 0)):
        out, _ = run(pj.chain(pj.lpa(bound=0.6, site=site, beta=0.5, direction=1.0), see(site)), problem)
        length = np.linalg.norm(out.metrics["seen/value"] - clean[site], axis=1)
        assert (length <= 0.6 * 0.5**power * (1 + 1e-4)).all() and (length > 0.6 * 0.5**power * 0.9).all()


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_plus_raises_and_minus_lowers_the_loss_of_every_class(problem, direction):
    out, _ = run(pj.lpa(direction=direction), problem)
    change = out.losses - run((), problem)[0].losses
    for c in np.unique(problem[2]):
        assert direction * change[problem[2] == c].mean() > 1e-3


def test_only_the_layers_behind_the_site_rerun(problem):
    """T steps and the last pass, which replaces the clean one, behind the site; once before it."""
    params, x, y = problem
    calls = dict.fromkeys(PIECES, 0)

    def counted(name):
        def piece(w, value):
            calls[name] += 1
            return PIECES[name](w, value)

        return piece

    made = objective(pj.lpa(site="stage1", num_steps=4), {name: counted(name) for name in PIECES})
    states = made.init(params, x)
    calls.update(dict.fromkeys(PIECES, 0))
    jax.make_jaxpr(jax.grad(lambda w: made(w, states, pj.batch(x, jnp.asarray(y)), epoch=0)[0]))(params)
    assert calls == dict(stage1=1, stage2=5, logits=5)


def test_searches_add_up_instead_of_multiplying(problem):
    """LPA's steps rerun the pass without LPL's search at the logits: that one starts from LPA's perturbed logits."""
    params, x, y = problem
    kw = dict(bound=0.4, step_size=0.2, direction=1.0)
    both, _ = run(pj.chain(pj.lpa(site="stage1", direction=1.0), pj.lpl(**kw)), problem)
    first, _ = run(pj.lpa(site="stage1", direction=1.0), problem)
    made = pj.objective(pj.line(lambda w, u: u + w[None]), pj.lpl(**kw), num_classes=C)
    _, then = made(jnp.zeros(C), made.init(jnp.zeros(C), first.logits), pj.batch(first.logits, jnp.asarray(y)))
    np.testing.assert_allclose(both.losses, then.losses, rtol=1e-5)


def test_no_gradient_leaks_through_the_perturbation(problem, float64):
    """The gradient is that of the loss with δ held fixed, to finite differences."""
    params, x, y = problem
    _, grads = run(pj.lpa(bound=0.5, site="stage1", direction=SIGN), problem)
    radius = np.full(C, 0.245)
    delta = oracle(params, x, y, sign=SIGN, radius=radius, rate=2 * radius / 3)[y]

    def loss(params):
        return -np.log(probabilities(logits_of(params, x @ params["a"] + delta))[np.arange(B), y]).mean()

    for name, value in params.items():
        difference = lambda e: (loss(params | {name: value + e}) - loss(params | {name: value - e})) / 2e-6
        numeric = [difference(e) for e in 1e-6 * np.eye(value.size).reshape(-1, *value.shape)]
        np.testing.assert_allclose(grads[name], np.reshape(numeric, value.shape), atol=1e-7)


def test_statistics_come_from_the_clean_pass_of_whole_epochs(problem):
    """First epoch: no directions, plain losses. Then: the top-1 accuracy of the epoch before, of logits without the delta."""
    params, x, y = problem
    link = pj.lpa(bound=20.0, site="stage1", split="accuracy")  # far enough to turn predictions round
    plain, _ = run((), problem)
    out, states = None, None
    for step in range(3):
        out, _ = run(link, problem, states, epoch=jnp.int32(step // 2))
        states = out.states
        if step < 2:
            np.testing.assert_allclose(out.losses, plain.losses, rtol=1e-6)
            assert (out.metrics["lpa/raised"], out.metrics["lpa/lowered"]) == (0, 0)
    hit = logits_of(params, x @ params["a"]).argmax(1) == y
    accuracy = np.array([hit[y == c].mean() if (y == c).any() else 0 for c in range(C)])
    np.testing.assert_allclose(states[0].mean, accuracy, atol=1e-6)
    np.testing.assert_allclose(
        states[0].total, [hit[y == c].sum() for c in range(C)], atol=1e-6
    )  # of the new epoch, clean again
    sign = np.where(accuracy < accuracy[np.unique(y)].mean(), 1, -1)
    raised = (out.losses - plain.losses)[sign[y] > 0]
    lowered = (out.losses - plain.losses)[sign[y] < 0]
    assert (out.metrics["lpa/raised"] == (sign[np.unique(y)] > 0).sum()) and len(lowered)
    assert len(raised) and raised.mean() > 0.1
    assert lowered.mean() < -1e-3


def test_varied_bounds_follow_the_split_s_statistic(problem):
    """ε_c = ε + Δε·|τ − s_c| (eq. 14), then γ_l: here by frequency with ranks, counts 10, 40, 5, 20, τ half of the classes."""
    params, x, y = problem
    link = pj.lpa(bound=pj.varied(eps=0.2, delta_eps=0.9), site="stage1", beta=0.5, split="frequency", tau=0.5)
    out, _ = run(pj.chain(link, see()), problem)
    radius = 0.25 * (0.2 + 0.9 * np.abs(0.5 - np.array([3, 1, 4, 2]) / 4))
    delta = oracle(params, x, y, sign=SIGN, radius=radius, rate=2 * radius / 3)
    np.testing.assert_allclose(out.metrics["seen/value"] - x @ params["a"], delta[y], rtol=1e-4, atol=1e-5)


def test_a_layer_scaled_bound_brings_its_own_factor(problem):
    settings = dict(site="stage1", direction=SIGN)
    own, _ = run(pj.lpa(bound=pj.layer_scaled(0.4, beta=0.6), beta=0.9, **settings), problem)
    same, _ = run(pj.lpa(bound=0.4, beta=0.6, **settings), problem)
    np.testing.assert_allclose(own.losses, same.losses, rtol=1e-6)


def test_two_sites_have_their_own_bounds(problem):
    """A chain of LPAs: the first one's search reruns the pass without the second one's."""
    chain = pj.chain(pj.lpa(site="stage1", bound=0.3, direction=1.0), pj.lpa(site="stage2", bound=0.6, direction=1.0))
    out, _ = run(pj.chain(chain, see("stage1")), problem)
    first, _ = run(pj.chain(pj.lpa(site="stage1", bound=0.3, direction=1.0), see("stage1")), problem)
    np.testing.assert_allclose(out.metrics["seen/value"], first.metrics["seen/value"], rtol=1e-5)
    assert out.losses.mean() > first.losses.mean() + 1e-3
    assert out.metrics["lpa/inner_evaluations"] == 6
    for site in ("stage1", "stage2"):  # each reports for itself
        assert out.metrics[f"lpa/raised@{site}"] == C and out.metrics[f"lpa/inner_evaluations@{site}"] == 3
    assert "lpa/raised" not in out.metrics


def test_by_frequency_the_rare_classes_are_raised(problem):
    """Counts 10, 40, 5, 20, half of the classes: from the first step on, as nothing has to be learnt first."""
    out, _ = run(pj.lpa(bound=0.5, split="frequency"), problem)
    change = out.losses - run((), problem)[0].losses
    for c, sign in ((0, 1), (1, -1), (2, 1)):
        assert sign * change[problem[2] == c].mean() > 1e-3
    assert (out.metrics["lpa/raised"], out.metrics["lpa/lowered"]) == (2, 2)


def test_statistics_by_step_are_in_use_at_once(problem):
    """split=by_accuracy(update="step"): the running mean of the true class's probability, of the clean pass; directions at step 1."""
    params, x, y = problem
    out, _ = run(pj.lpa(bound=20.0, site="stage1", split=pj.by_accuracy()), problem)
    q = probabilities(logits_of(params, x @ params["a"]))[np.arange(B), y]
    mean = np.array([q[y == c].mean() if (y == c).any() else 0 for c in range(C)])
    np.testing.assert_allclose(out.states[0].mean, mean, atol=1e-6)
    low = mean[:3] <= mean[:3].mean()
    assert (out.metrics["lpa/raised"], out.metrics["lpa/lowered"]) == (low.sum(), (~low).sum())
    again, _ = run(pj.lpa(bound=20.0, site="stage1", split=pj.by_accuracy()), problem, out.states)
    np.testing.assert_allclose(again.states[0].mean, mean, atol=1e-6)  # clean again, not of the perturbed logits


def test_expansion_is_the_classes_mean_norm_after_over_before(problem):
    """Over the raised and over the lowered classes in the batch, at every sample's norm; class 3 is absent and left out."""
    params, x, y = problem
    out, _ = run(pj.chain(pj.lpa(bound=3.0, site="stage1", direction=SIGN), see()), problem)
    before, after = (np.linalg.norm(v, axis=1) for v in (x @ params["a"], out.metrics["seen/value"]))
    ratio = np.array([after[y == c].mean() / before[y == c].mean() for c in range(3)])
    assert np.abs(ratio - 1).min() > 1e-2
    np.testing.assert_allclose(out.metrics["lpa/expansion_raised"], ratio[[0, 2]].mean(), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["lpa/expansion_lowered"], ratio[1], rtol=1e-5)
    up, _ = run(pj.lpa(bound=3.0, site="stage1", direction=1.0), problem)
    assert up.metrics["lpa/expansion_lowered"] == 1 and up.metrics["lpa/expansion_raised"] != 1


def test_amplification_is_that_of_the_search_s_last_evaluation(problem, float64):
    """‖Δu‖/‖δ‖ at δ after two of three steps, over the samples that are moved (class 1 is left alone), by the oracle.

    LPL behind it moves the logits too, and is no part of it. With one step nothing but the clean pass has been evaluated.
    """
    params, x, y = problem
    sign, radius = np.array([1.0, 0.0, -1.0, 1.0]), np.full(C, 0.49 * 0.8)
    link = pj.lpa(bound=0.8, site="stage1", direction=sign)
    hidden, moved = x @ params["a"], y != 1
    delta = moved[:, None] * oracle(params, x, y, sign=sign + (sign == 0), radius=radius, rate=2 * radius / 3, steps=2)[y]
    change = np.linalg.norm(logits_of(params, hidden + delta) - logits_of(params, hidden), axis=1)
    wanted = (change[moved] / np.linalg.norm(delta, axis=1)[moved]).mean()
    for links in (link, pj.chain(link, pj.lpl(direction=1.0))):
        np.testing.assert_allclose(run(links, problem)[0].metrics["lpa/amplification"], wanted, rtol=1e-5)
    once = pj.lpa(bound=0.8, site="stage1", direction=sign, num_steps=1)
    assert run(once, problem)[0].metrics["lpa/amplification"] == 0


def test_amplification_stays_below_the_bounds(problem, float64):
    """Eq. 17: below the product of the norms behind the site; of a small δ below the Jacobian's norm, which that product bounds."""
    params, x, y = problem
    behind = {"stage1": ("b", "c"), "stage2": ("c",)}
    for site, names in behind.items():
        product = float(pj.lipschitz_product(*(params[name] for name in names)))
        local = np.asarray(pj.local_amplification(PIECES, params, x, site=site))
        assert (local <= product).all()
        for bound in (1e-4, 1.0, 10.0):
            found = float(run(pj.lpa(bound=bound, site=site, direction=1.0), problem)[0].metrics["lpa/amplification"])
            assert found <= product  # eq. 17, of every δ
            if bound <= 1:  # and not next to nothing, until the hyperbolic tangents are saturated
                assert 0.05 * product < found
            if bound <= 1e-3:
                assert found <= local.mean() * (1 + 1e-3)


def test_a_varied_number_of_samples_leaves_the_amplification_out(problem):
    """A link that doubles the batch behind the site: one row of delta for two rows of logits."""
    double = lambda v: jnp.concatenate([v, v])
    fields = ("value", "labels", "targets", "weights", "index", "penalty")
    change = lambda flow: flow._replace(**{name: double(getattr(flow, name)) for name in fields})
    twice = pj.Perturbation("stage2", lambda c: (), lambda flow, rest, s, c: (change(flow), s, {}))
    out, _ = run(pj.chain(pj.lpa(site="stage1", direction=1.0), twice, pj.lpl(direction=1.0)), problem)
    assert out.losses.shape == (2 * B,) and out.metrics["lpa/amplification"] == 0


@pytest.mark.parametrize("first", ["lpa", "sites", "lpl"])
def test_statistics_behind_a_search_are_those_of_the_clean_pass(problem, first):
    """Of all of LPA, LPL and LPG behind it, as if the first method weren't there, though it turns predictions round."""
    far = {
        "lpa": lambda: pj.lpa(bound=50.0, site="stage1", direction=1.0),
        "sites": lambda: pj.lpa(bound=50.0, site=("input", "stage1"), direction=1.0),
        "lpl": lambda: pj.lpl(bound=50.0, step_size=5.0, direction=1.0),
    }[first]()
    params, x, y = problem
    split, batch = pj.by_accuracy(), pj.batch(x, jnp.asarray(y))
    behind = (
        (pj.lpg(split=split),)
        if first == "lpl"
        else (pj.lpa(site="stage2", split=split), pj.lpl(split=split), pj.lpg(split=split))
    )

    def statistics(*links):
        made = pj.objective(PIECES, pj.chain(*links), num_classes=C, num_examples=4 * B)
        out = quick(lambda states: made(params, states, batch, step=1)[1])(made.init(params, x))
        return out.states[-len(behind) :], out.losses

    clean, plain = statistics(pj.lpl(split=split))
    after, moved = statistics(far, *behind)
    assert np.abs(moved - plain).max() > 1
    for found in after:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, clean[-1])


KNOW_THE_LABEL = {
    "logpert": lambda: pj.logpert(weight=0.05),
    "mixpert": lambda: pj.mixpert(pro=50, eps1=8),
    "ldam": lambda: pj.ldam(margin=3.0, scale=5.0),
    "cosface": lambda: pj.cosface(margin=3.0, scale=5.0),
    "adaptive_margin": lambda: pj.adaptive_margin(margin=1.0, scale=5.0),
    "self_paced_logit": lambda: pj.self_paced_logit(tau=0.1, start=0.1),
}


@pytest.mark.parametrize(
    "name, order", [*((name, (0, 1, 2, 3)) for name in KNOW_THE_LABEL), ("logpert", (1, 0, 2, 3)), ("logpert", (1, 2, 0, 3))]
)
def test_statistics_next_to_a_link_that_knows_the_label_are_those_without_it(problem, name, order):
    params, x, y = problem
    split = pj.by_accuracy()
    links = [KNOW_THE_LABEL[name](), pj.lpa(site="stage2", split=split), pj.lpl(split=split), pj.lpg(split=split)]
    batch = pj.batch(x, jnp.asarray(y))

    def statistics(*links):
        made = pj.objective(PIECES, pj.chain(*links), num_classes=C, class_counts=np.arange(1, C + 1))
        out = quick(lambda states: made(params, states, batch, step=1, progress=0.5)[1])(made.init(params, x))
        return out.states, out.losses

    (clean,), plain = statistics(pj.lpl(split=split))
    states, moved = statistics(*(links[i] for i in order))
    assert np.abs(moved - plain).max() > 1e-3
    for place, state in zip(order, states, strict=True):
        if place:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, clean)


def test_between_candidates_of_which_none_has_searched_yet_the_own_pass_is_clean(problem):
    """An LPA at stage2, with candidates before and behind it: the one behind is chosen, or the one before."""
    params, x, y = problem
    own = pj.lpa(site="stage2", split=pj.by_accuracy())
    made = pj.objective(
        PIECES, pj.chain(pj.lpa(bound=50.0, site=("stage1", "logits"), direction=1.0), own), num_classes=C, num_examples=4 * B
    )
    alone = run(own, problem)[0].states[0]
    for chosen in (0, 1):
        states = made.init(params, x)
        states = (states[0]._replace(effects=jnp.eye(2)[chosen]), *states[1:])
        out = quick(lambda states: made(params, states, pj.batch(x, jnp.asarray(y)), step=1)[1])(states)
        assert out.metrics["lpa/site"] == chosen
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), out.states[2], alone)


def flops(links, classes):
    """Of loss and gradient, by the compiler's count before optimisation; nothing runs."""
    f, shape = jnp.float32, jax.ShapeDtypeStruct
    params = {"a": shape((D, D), f), "b": shape((D, D), f), "c": shape((D, classes), f)}
    made = pj.objective(PIECES, links, num_classes=classes)
    states = jax.eval_shape(lambda w: made.init(w, jnp.zeros((B, D))), params)
    step = jax.jit(jax.value_and_grad(lambda w, s, x, y: made(w, s, pj.Batch(x, y))[0]))
    cost = step.lower(params, states, shape((B, D), f), shape((B,), jnp.int32)).cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_nothing_but_the_class_means_scales_with_the_number_of_classes(classes):
    """Each of T = 3 steps reruns the network (at most a plain step) and takes class means, 2·B·C·D, with a few operations on [C, D].

    A pass for each class would be C plain steps.
    """
    means = 3 * classes * (2 * B * (D + 2) + 40 * D)
    assert flops(pj.lpa(site="stage1", direction=1.0), classes) <= 4 * flops((), classes) + means
    assert means < 3 * flops((), classes)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bound=-0.1), "lpa needs bound >= 0, got -0.1"),
        (dict(num_steps=0), "lpa needs num_steps >= 1, got 0"),
        (dict(step="big"), "lpa needs step to be one of its names, got 'big'"),
        (dict(beta=1.5), "layer_scaled needs 0 < beta <= 1, got 1.5"),
        (dict(step_size=-1.0), "lpa needs step_size >= 0, got -1"),
    ],
)
def test_errors_say_what_was_given(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.lpa(**settings)


def test_an_unknown_site_lists_the_known_ones():
    with pytest.raises(ValueError, match="got 'stage9'.*There are: input, logits, stage1, stage2"):
        objective(pj.lpa(site="stage9"))
