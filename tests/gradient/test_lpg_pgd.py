"""perturbjax.gradient.lpg_pgd: eqs. 16–17 by explicit Jacobians, head against full, the exact solutions, devices, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from tests.gradient.lpg_problem import (
    COUNTS,
    EPS,
    HEAD,
    LINEAR,
    NET,
    SIGN,
    B,
    C,
    D,
    assert_close,
    double,
    forward,
    gradients,
    hidden,
    jacobians,
    linear,
    logit_gradients,
    problem,
    quick,
    searched_by_class,
)

FORMS = [dict(), dict(step="unit"), dict(granularity="sample"), dict(step="unit", granularity="sample", clamp=False)]
FORMS += [dict(num_steps=5, step_size=0.125), dict(clamp=False, num_steps=1)]


@pytest.fixture
def float64():
    with double():
        yield


def pulled(f, params, x):
    pull = jax.vjp(lambda p: f(p, x), jax.tree.map(jnp.asarray, params))[1]
    return lambda v: pull(v)[0]


def full_delta(f, params, x, h, y, **options):
    return quick(lambda h: pj.lpg_full_delta(h, jnp.asarray(y), pulled(f, params, x), **options))(h)


# ---------------------------------------------------------------------------------------------- the equations, in numpy


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_head_is_the_paper_s_search_over_the_last_layer_s_jacobian(float64, options):
    params, x, y = problem()
    a = np.asarray(hidden(params, x))
    h = logit_gradients(forward(params, x), y)
    head = {name: params[name] for name in ("w", "b")}
    for bias in (True, False):
        f = linear if bias else lambda p, x: x @ p["w"].T
        expected = searched_by_class(jacobians(f, head if bias else {"w": head["w"]}, a), h, y, **options)
        ours = pj.lpg_head_delta(jnp.asarray(h), jnp.asarray(a), y, direction=SIGN, bound=EPS, bias=bias, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_full_is_the_paper_s_search_over_the_whole_jacobian(float64, options):
    params, x, y = problem()
    h = logit_gradients(forward(params, x), y)
    expected = searched_by_class(jacobians(forward, params, x), h, y, **options)
    np.testing.assert_allclose(
        full_delta(forward, params, x, h, y, direction=SIGN, bound=EPS, **options), expected, rtol=1e-9, atol=1e-12
    )


def test_one_unit_step_is_the_slope_of_the_class_s_gradient_norm_by_finite_differences(float64):
    """The norm of a gradient that jax.grad makes of the class's loss with ⟨δ, u⟩ added: nothing of LPG's algebra in it."""
    params, x, y = problem()
    h = logit_gradients(forward(params, x), y)
    for names, ours in (
        (
            ("w", "b"),
            pj.lpg_head_delta(jnp.asarray(h), hidden(params, x), y, direction=1.0, bound=0.5, num_steps=1, step="unit"),
        ),
        (("a", "w", "b"), full_delta(forward, params, x, h, y, direction=1.0, bound=0.5, num_steps=1, step="unit")),
    ):
        for c in np.unique(y):

            def phi(delta, c=c, names=names):
                def loss(p):
                    u = forward({**params, **p}, x[y == c])
                    return (-jax.nn.log_softmax(u)[:, c] + u @ delta).mean()

                grads = jax.grad(loss)({name: jnp.asarray(params[name]) for name in names})
                return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))

            at = quick(jax.vmap(phi))
            slope = np.asarray(at(1e-5 * jnp.eye(C)) - at(-1e-5 * jnp.eye(C))) / 2e-5
            expected = 0.5 * slope / np.linalg.norm(slope)  # κ = 2ε/T = 1, then projected on ε
            np.testing.assert_allclose(np.asarray(ours)[y == c], np.broadcast_to(expected, [(y == c).sum(), C]), atol=1e-6)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_head_is_full_where_only_the_last_layer_has_parameters(float64, options):
    _, x, y = problem()
    settings = dict(inference="pgd", bound=EPS, direction=SIGN, **options)
    (by_head, loss, out), (by_full, _, _) = (
        gradients(pj.lpg(jacobian=jacobian, **settings), LINEAR) for jacobian in ("head", "full")
    )
    assert_close(by_head, by_full, rtol=1e-9, atol=1e-12)
    plain, plain_loss, plain_out = gradients((), LINEAR)
    np.testing.assert_array_equal(loss, plain_loss)  # the forward pass is untouched
    np.testing.assert_array_equal(out.logits, plain_out.logits)
    assert max(float(jnp.abs(plain[name] - by_head[name]).max()) for name in plain) > 1e-2


@pytest.mark.parametrize("jacobian", ["head", "full"])
def test_parameters_get_the_perturbed_logit_gradient(float64, jacobian):
    params, x, y = problem()
    h = logit_gradients(forward(params, x), y)
    own = {name: params[name] for name in ("w", "b")}
    j = jacobians(linear, own, np.asarray(hidden(params, x))) if jacobian == "head" else jacobians(forward, params, x)
    delta = searched_by_class(j, h, y)
    grads, _, _ = gradients(pj.lpg(inference="pgd", jacobian=jacobian, bound=EPS, direction=SIGN))
    assert_close(grads, pulled(forward, params, x)(jnp.asarray((h + delta) / B)), rtol=1e-9, atol=1e-12)


def test_full_goes_through_batch_norm_links_and_the_logits_own_perturbation(float64):
    """The Jacobian is that of the pass as it is: batch statistics, another link's mixing, LPL's and LA's logits."""
    params, x, y = problem()
    norm = lambda a: (a - a.mean(0)[None]) / jnp.sqrt(a.var(0) + 0.1)[None]
    pieces = {
        "stage1": lambda w, x, stats, **_: (jnp.tanh(x @ w["a"]), stats),
        "features": lambda w, x, stats, *, train, key: (norm(x) if train else x, stats),
        "logits": lambda w, x, stats, **_: (x @ w["w"].T + w["b"][None], stats),
    }
    link = lambda site, change: pj.Perturbation(
        site, lambda c: (), lambda f, r, s, c: (f._replace(value=change(f.value, c)), s, {})
    )
    twice = link("input", lambda x, context: 2 * x)
    of_head = link("logits", lambda u, context: u + jnp.sum(context.head()[0] ** 2, axis=1)[None])
    chain = pj.chain(
        twice, of_head, pj.logit_adjustment(), pj.lpl(bound=0.25, step_size=0.25, direction=SIGN),
        pj.lpg(inference="pgd", jacobian="full", bound=EPS, direction=SIGN),
    )  # fmt: skip
    grads, _, out = gradients(chain, pj.line(pieces, stateful=True, head=HEAD))
    h = logit_gradients(out.logits, y)

    def whole(params, x):
        u = norm(jnp.tanh(2 * x @ params["a"])) @ params["w"].T + params["b"][None]
        return u + jnp.sum(params["w"] ** 2, axis=1)[None]

    # A sample's logits depend on the others' inputs, not on their own parameters' copies: per-sample Jacobians still add up.
    expected = h + searched_by_class(jacobians(whole, params, x), h, y)
    assert_close(grads, pulled(whole, params, x)(jnp.asarray(expected / B)), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------- what the search does


def many(count=300):
    """Random gradients and features of `count` one-class batches: h [count, 6, C], a [count, 6, D]."""
    rng = np.random.default_rng(7)
    u = 3 * rng.normal(size=(count, 6, C))
    h = np.exp(u) / np.exp(u).sum(-1, keepdims=True)
    h[..., 0] -= 1
    return jnp.asarray(h, jnp.float32), jnp.asarray(rng.normal(size=(count, 6, D)) + 0.5, jnp.float32)


def head_norm(h, a):
    """‖mean (h_i, a_i 1)‖_F, from the outer products themselves."""
    a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
    return np.linalg.norm(np.einsum("nbi,nbj->nij", h, a) / h.shape[1], axis=(1, 2))


@pytest.mark.parametrize("bound", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("step", ["sign", "unit"])
def test_plus_grows_and_minus_shrinks_the_class_s_parameter_gradient(step, bound):
    """Conjectures 1 and 2 (eqs. 5–6), on what eqs. 16–17 search: never past the lowest point, however large the bound."""
    h, a = many()
    y = jnp.zeros([h.shape[1]], jnp.int32)
    f = lambda s: jax.jit(jax.vmap(lambda h, a: h + pj.lpg_head_delta(h, a, y, direction=s, bound=bound, step=step)))(h, a)
    before, grown, shrunk = head_norm(h, a), head_norm(f(1.0), a), head_norm(f(-1.0), a)
    assert (grown > before).all() and (shrunk < before * (1 - 1e-7 * (bound >= 0.1))).all()


def test_without_clamp_dampening_walks_past_the_lowest_point():
    h, a = many()
    y = jnp.zeros([h.shape[1]], jnp.int32)
    find = jax.vmap(lambda h, a: pj.lpg_head_delta(h, a, y, direction=-1.0, bound=30.0, clamp=False))
    assert (head_norm(h + jax.jit(find)(h, a), a) > 2 * head_norm(h, a)).all()


def test_unit_steps_reach_the_exact_solution_of_the_head(float64):
    """φ² = const + s·‖δ + b/s‖²: its largest value in the ball is at ε·b/‖b‖, its smallest at −min(ε, ‖b‖/s)·b/‖b‖."""
    params, x, y = problem()
    a, h = np.asarray(hidden(params, x)), logit_gradients(forward(params, x), y)
    for c in np.unique(y):
        own, lengthened = y == c, np.concatenate([a, np.ones([B, 1])], axis=1)[y == c]
        m, mean = lengthened.T @ h[own] / own.sum(), lengthened.mean(0)
        b, s = m.T @ mean, mean @ mean
        for eps in (0.125, 8.0):
            find = lambda sign: np.asarray(
                pj.lpg_head_delta(jnp.asarray(h), jnp.asarray(a), y, direction=sign, bound=eps, step="unit")
            )[own][0]
            np.testing.assert_allclose(find(1.0), eps * b / np.linalg.norm(b), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(
                find(-1.0), -min(eps, np.linalg.norm(b) / s) * b / np.linalg.norm(b), rtol=1e-9, atol=1e-12
            )


def test_a_sample_s_own_exact_solution_is_the_closed_form(float64):
    """φ_i = ‖(a_i, 1)‖·‖h_i + δ‖: along h_i, and dampening stops at zero."""
    params, x, y = problem()
    a, h = hidden(params, x), jnp.asarray(logit_gradients(forward(params, x), y))
    for eps in (EPS, 8.0):
        kw = dict(direction=SIGN, bound=eps, granularity="sample")
        ours = pj.lpg_head_delta(h, jnp.asarray(a), y, step="unit", **kw)
        np.testing.assert_allclose(ours, pj.lpg_delta(h, jnp.asarray(y), **kw), rtol=1e-9, atol=1e-12)


def test_the_delta_stays_in_the_ball_and_a_sign_step_meets_it_at_once(float64):
    params, x, y = problem()
    a, h = hidden(params, x), jnp.asarray(logit_gradients(forward(params, x), y))
    for steps in (1, 2, 3):
        delta = pj.lpg_head_delta(h, a, y, direction=1.0, bound=EPS, step_size=2 * EPS / 3, num_steps=steps)
        np.testing.assert_allclose(np.linalg.norm(delta, axis=1), EPS[y], rtol=1e-9)
    short = pj.lpg_head_delta(h, a, y, direction=1.0, bound=EPS, step_size=0.01, num_steps=3, step="unit")
    assert (np.linalg.norm(short, axis=1) <= 0.03 + 1e-12).all()
    np.testing.assert_allclose(
        pj.lpg_head_delta(h, a, y, direction=1.0, bound=np.inf, step_size=0.01, num_steps=3),
        pj.lpg_head_delta(h, a, y, direction=1.0, bound=9.0, step_size=0.01, num_steps=3),
    )


def test_nothing_to_search_along_gives_zeros():
    h, a, y = jnp.zeros([3, C]), jnp.ones([3, D]), jnp.array([0, 0, 1])
    for granularity in ("category", "sample"):
        for step in ("sign", "unit"):
            kw = dict(direction=-1.0, bound=0.3, step=step, granularity=granularity)
            np.testing.assert_array_equal(pj.lpg_head_delta(h, a, y, **kw), 0.0)
            np.testing.assert_array_equal(pj.lpg_head_delta(h + 0.1, 0 * a, y, bias=False, **kw), 0.0)
            np.testing.assert_array_equal(quick(lambda h: pj.lpg_full_delta(h, y, lambda v: v.sum(0), **kw))(h), 0.0)


def test_samples_of_no_class_get_nothing_and_change_nothing(float64):
    params, x, y = problem()
    a, h = hidden(params, x), jnp.asarray(logit_gradients(forward(params, x), y))
    padded = np.where(np.arange(B) < 2, -1, y)
    padded[1] = C
    for granularity in ("category", "sample"):
        kw = dict(direction=SIGN, bound=EPS, granularity=granularity)
        for find in (
            lambda h, y, rows: pj.lpg_head_delta(h, a[rows], y, **kw),
            lambda h, y, rows: pj.lpg_full_delta(h, y, pulled(forward, params, x[rows]), **kw),
        ):
            ours = quick(lambda h, y: find(h, y, slice(None)))(h, jnp.asarray(padded))
            without = quick(lambda h: find(h[2:], jnp.asarray(y[2:]), slice(2, None)))(h)
            np.testing.assert_array_equal(ours[:2], 0.0)
            np.testing.assert_allclose(ours[2:], without, rtol=1e-9, atol=1e-12)


def test_no_gradient_flows_through_the_search(float64):
    params, x, y = problem()
    a, h = hidden(params, x), jnp.asarray(logit_gradients(forward(params, x), y))
    kw = dict(direction=SIGN, bound=8.0, step="unit")  # so far down that the lowest point of the line is used

    def total(h, a, params):
        found = pj.lpg_head_delta(h, a, y, **kw) + pj.lpg_full_delta(h, y, pulled(forward, params, x), **kw)
        return (found**2).sum()

    for leaf in jax.tree.leaves(quick(jax.grad(total, argnums=(0, 1, 2)))(h, a, jax.tree.map(jnp.asarray, params))):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize("step", ["sign", "unit"])
def test_derivatives_of_the_bound_and_the_step_size_are_alive(float64, step):
    """For learning them: as finite differences have it, the way of the search (signs, directions) held still."""
    params, x, y = problem()
    a, h = hidden(params, x), jnp.asarray(logit_gradients(forward(params, x), y))
    find = lambda eps, rate: pj.lpg_head_delta(h, a, y, direction=1.0, bound=eps, step_size=rate, num_steps=2, step=step)
    for at in ((0.05, 0.1), (9.0, 0.1)):  # at the border of the ball; inside
        for k in range(2):
            one = quick(jax.jacobian(find, argnums=k))(*at)
            nudge = 1e-6 * np.eye(2)[k]
            numeric = (quick(find)(*(at + nudge)) - quick(find)(*(at - nudge))) / 2e-6
            np.testing.assert_allclose(one, numeric, atol=1e-6)
            assert (np.abs(numeric).max() > 0.1) == (k == (0 if at[0] < 1 else 1))


def test_narrow_numbers_are_computed_in_float32():
    params, x, y = problem()
    h, a = jnp.asarray(logit_gradients(forward(params, x), y), jnp.bfloat16), jnp.asarray(hidden(params, x), jnp.bfloat16)
    kw = dict(direction=SIGN, bound=EPS)
    ours = pj.lpg_head_delta(h, a, y, **kw)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, pj.lpg_head_delta(h.astype(jnp.float32), a.astype(jnp.float32), y, **kw))


# -------------------------------------------------------------------------------------------------- devices, cost, errors


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("granularity", ["category", "sample"])
@pytest.mark.parametrize("jacobian", ["head", "full"])
def test_three_devices_are_one_device(jacobian, granularity, check_vma):
    params, x, y = problem()
    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, x))
    link = pj.lpg(inference="pgd", jacobian=jacobian, granularity=granularity, direction=SIGN, bound=EPS)

    def part(params, x, y, axis_name=None):
        made = pj.objective(NET, link, num_classes=C, class_counts=COUNTS, axis_name=axis_name)
        grads = jax.grad(lambda p: made(p, made.init(p, x), pj.batch(x, y))[0])(params)
        if axis_name is None:
            return grads
        # With the check, gradients of what all devices share come out summed over them.
        return jax.tree.map(lambda g: g / 3, grads) if check_vma else jax.lax.pmean(grads, axis_name)

    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    P = PartitionSpec
    mapped = jax.shard_map(
        functools.partial(part, axis_name="d"), mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=check_vma
    )
    assert_close(jax.jit(mapped)(params, x, y), jax.jit(part)(params, x, y), rtol=1e-4, atol=1e-5)


def test_a_user_s_pullback_of_shared_parameters_under_shard_map():
    """There the gradient comes out summed over devices already; sums of sums have the same direction."""
    params, x, y = problem()
    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, x))
    h = jnp.asarray(logit_gradients(forward(params, x), y), jnp.float32)
    kw = dict(direction=SIGN, bound=EPS)
    find = lambda p, x, h, y: pj.lpg_full_delta(h, y, pulled(forward, p, x), axis_name="d", **kw)
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    P = PartitionSpec
    mapped = jax.shard_map(find, mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d")), out_specs=P("d"))
    one = pj.lpg_full_delta(h, y, pulled(forward, params, x), **kw)
    np.testing.assert_allclose(jax.jit(mapped)(params, x, h, y), one, rtol=1e-4, atol=1e-5)


def test_the_head_s_search_runs_nothing_of_the_network_again_and_has_no_loop():
    passes = []

    def stage(w, x):
        passes.append(1)
        return jnp.tanh(x @ w["a"])

    params, x, y = problem()
    params, x = jax.tree.map(jnp.asarray, (params, x))
    model = pj.line({"stage1": stage, "features": lambda w, x: x, "logits": lambda w, x: x @ w["w"].T}, head=HEAD)

    def program(links):
        made = pj.objective(model, links, num_classes=C, class_counts=COUNTS)
        states = made.init(params, x)
        passes.clear()
        return str(jax.make_jaxpr(jax.grad(lambda p: made(p, states, pj.batch(x, y))[0]))(params)), len(passes)

    _, plain = program(())
    text, head = program(pj.lpg(inference="pgd", direction=SIGN))
    assert head == plain == 1
    assert "scan" not in text and "while" not in text
    text, full = program(pj.lpg(inference="pgd", jacobian="full", direction=SIGN))
    assert full == 2  # one program for all classes: linearised once
    assert "scan" not in text and "while" not in text


def test_the_full_search_says_what_it_costs():
    _, _, out = gradients(pj.lpg(inference="pgd", jacobian="full", direction=SIGN))
    assert out.metrics["lpg/inner_evaluations"] == 4 * C
    _, _, out = gradients(pj.lpg(inference="pgd", jacobian="full", direction=SIGN, granularity="sample", num_steps=1))
    assert out.metrics["lpg/inner_evaluations"] == 2 * B
    assert "lpg/inner_evaluations" not in gradients(pj.lpg(inference="pgd", direction=SIGN))[2].metrics


def test_a_head_without_bias_says_so(float64):
    """head -> (W, None): then h̄ itself is no row of the gradient, and head is full again."""
    model = pj.line(
        {"features": lambda w, x: x, "logits": lambda w, x: x @ w["w"].T + 0 * w["b"][None]}, head=lambda w: (w["w"], None)
    )
    settings = dict(inference="pgd", bound=EPS, direction=SIGN, step="unit")
    head, full = (gradients(pj.lpg(jacobian=j, **settings), model)[0] for j in ("head", "full"))
    assert_close(head, full, rtol=1e-9, atol=1e-12)


def test_needs_are_those_of_the_setting():
    bare = {"logits": lambda w, x: x @ w["w"].T}
    params, x, y = problem()
    for links in (pj.lpg(), pj.lpg(granularity="sample"), pj.lpg(inference="pgd", jacobian="full")):
        pj.objective(bare, links, num_classes=C)
    with pytest.raises(ValueError, match="lpg needs 'features', got none"):
        pj.objective(bare, pj.lpg(inference="pgd"), num_classes=C)
    with pytest.raises(ValueError, match=r"lpg needs 'head', got none. Give pj.line\(..., head="):
        pj.objective(dict(features=lambda w, x: x, **bare), pj.lpg(inference="pgd"), num_classes=C)


def test_errors_say_what_was_given():
    for settings, message in (
        (dict(inference="sgd"), "lpg needs inference to be one of its names, got 'sgd'"),
        (dict(inference="pgd", jacobian="last"), "lpg needs jacobian to be one of its names, got 'last'"),
        (dict(inference="pgd", step="raw"), "lpg needs step to be one of its names, got 'raw'"),
        (dict(granularity="corpus"), "lpg needs granularity to be one of its names, got 'corpus'"),
        (dict(inference="pgd", num_steps=0), "lpg needs num_steps >= 1, got 0"),
        (dict(inference="pgd", step_size=-0.1), "lpg needs step_size >= 0, got -0.1"),
        (dict(jacobian="full"), "lpg needs inference='pgd' for settings of its search, got jacobian='full'"),
        (dict(step="unit"), "lpg needs inference='pgd' for settings of its search.*step='unit'"),
        (dict(inference="pgd", form="scale"), "lpg needs form='shift' with inference='pgd', got 'scale'"),
    ):
        with pytest.raises(ValueError, match=message):
            pj.lpg(**settings)
    with pytest.raises(
        ValueError, match=r"lpg_head_delta needs features \[B, d\] and labels \[B\], got \(3, 2, 2\) and \(3,\)"
    ):
        pj.lpg_head_delta(jnp.zeros([3, C]), jnp.zeros([3, 2, 2]), jnp.zeros([3], int), direction=1.0, bound=0.1)
    with pytest.raises(ValueError, match=r"lpg_full_delta needs logits \[B, C\] and labels \[B\], got \(3, 4\) and \(2,\)"):
        pj.lpg_full_delta(jnp.zeros([3, C]), jnp.zeros([2], int), lambda v: v, direction=1.0, bound=0.1)
