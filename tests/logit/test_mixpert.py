"""perturbjax.logit.mixpert: eqs. 56–61 and 66 in numpy, its two limits, who is hard, cost, and the official code's switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import perturbjax as pj
from perturbjax import spec, taxonomy

C, B, D = 4, 12, 6
MODEL = {"stage1": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, x: x @ w["b"]}


@pytest.fixture
def problem():
    """Parameters, inputs in [0, 1] and labels in float64."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(D, 5)), "b": 2 * rng.normal(size=(5, C))}
    with jax.enable_x64(True):
        yield params, rng.uniform(size=(B, D)), rng.integers(0, C, B).astype(np.int32)


def forward(params, x):
    return np.tanh(x @ params["a"]) @ params["b"]


def softmax(u):
    return np.exp(u) / np.exp(u).sum(1, keepdims=True)


def cross_entropy(u, y):
    return -np.log(softmax(u))[np.arange(len(y)), y]


def slope(params, x, y):
    """∂ℓ_i/∂x_i by hand."""
    hidden = np.tanh(x @ params["a"])
    return ((softmax(hidden @ params["b"]) - np.eye(C)[y]) @ params["b"].T * (1 - hidden**2)) @ params["a"].T


def run(problem, link, *, key=0, **fields):
    """(Output, gradients, the inputs as the network saw them)."""
    params, x, y = problem
    links = pj.chain(link)
    see = pj.Perturbation("input", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(MODEL, pj.chain(links, see), num_classes=C)
    data = pj.batch(x, jnp.asarray(y), index=10 * jnp.arange(B), **fields)
    grads, out = jax.grad(made, has_aux=True)(params, made.init(params, x), data, key=jax.random.key(key))
    return out, grads, np.asarray(out.metrics["seen/value"])


def hardest(losses, number):
    hard = np.zeros(len(losses), bool)
    hard[np.argsort(-losses)[:number]] = True
    return hard


# ---------------------------------------------------------------------------------------------------------- the logit part


@pytest.mark.parametrize("form", ["step", "ball"])
def test_thresholded_form_lowers_the_hard_samples_only(problem, form):
    """Eq. 56: u + ε₁(ŷ − p) (eqs. 58–60), or the ball's minimum, where l_i ≥ τ."""
    params, x, y = problem
    u, losses = forward(params, x), cross_entropy(forward(params, x), y)
    tau = np.median(losses)
    out, _, seen = run(problem, pj.mixpert(eps1=0.8, tau=tau, form=form))
    step = np.eye(C)[y] - softmax(u) if form == "step" else 2 * np.eye(C)[y] - 1
    moved = np.where((losses >= tau)[:, None], u + 0.8 * step, u)
    np.testing.assert_allclose(out.losses, cross_entropy(moved, y), rtol=1e-10)
    np.testing.assert_array_equal(seen, x)
    assert (np.asarray(out.losses)[losses >= tau] < losses[losses >= tau]).all()
    assert float(out.metrics["mixpert/hard"]) == (losses >= tau).mean()


def test_ball_is_the_minimum_over_the_ball(problem):
    """No corner and no random point of the l∞ ball is lower, and the step of eq. 59 lies within it."""
    params, x, y = problem
    u, rng = forward(params, x), np.random.default_rng(1)
    best, step = (np.asarray(pj.mixpert_delta(jnp.asarray(u), jnp.asarray(y), bound=0.7, form=f)) for f in ("ball", "step"))
    assert np.abs(best).max() == pytest.approx(0.7) and np.abs(step).max() <= 0.7
    corners = 0.7 * np.array(np.meshgrid(*[[-1, 1]] * C)).reshape(C, -1).T
    for v in (*corners, *rng.uniform(-0.7, 0.7, (200, C))):
        assert (cross_entropy(u + best, y) <= cross_entropy(u + v[None], y) + 1e-12).all()
    assert (cross_entropy(u + step, y) <= cross_entropy(u, y)).all()


@pytest.mark.parametrize("pro, number", [(0, 0), (15, 2), (25, 3), (50, 6), (100, 12)])
def test_top_percent_by_loss_are_hard(problem, pro, number):
    """round(pro · B) of them, as the official code rounds; τ is the smallest of their losses."""
    params, x, y = problem
    losses = cross_entropy(forward(params, x), y)
    hard, tau = pj.hard_samples(jnp.asarray(losses), pro=pro)
    np.testing.assert_array_equal(hard, hardest(losses, number))
    np.testing.assert_allclose(tau, np.sort(losses)[::-1][max(number - 1, 0)])
    out, *_ = run(problem, pj.mixpert(pro=pro, eps1=0.5))
    changed = np.abs(np.asarray(out.logits) - forward(params, x)).max(1) > 1e-9
    np.testing.assert_array_equal(changed, hardest(losses, number))


def test_hard_samples_are_those_of_all_devices():
    losses = jnp.asarray(np.random.default_rng(2).permutation(16).astype(np.float32))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    f = lambda l: pj.hard_samples(l, pro=25.0, axis_name="d")
    hard, tau = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()), check_vma=False)(losses)
    np.testing.assert_array_equal(hard, losses >= 12)
    assert tau == 12


def test_mixed_targets_are_stepped_towards(problem):
    params, x, y = problem
    targets = 0.7 * np.eye(C)[y] + 0.3 * np.eye(C)[(y + 1) % C]
    out, *_ = run(problem, pj.mixpert(tau=0.0, eps1=0.5), targets=jnp.asarray(targets))
    u = forward(params, x)
    np.testing.assert_allclose(out.logits, u + 0.5 * (targets - softmax(u)), rtol=1e-10)


# ---------------------------------------------------------------------------------------------------------- the input part


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("random_starts", [False, True])
def test_both_directions_are_equation_57_in_numpy(problem, adaptive, random_starts):
    """PGD in the l∞ ball for l_i < τ, the step at the logits for the others; with eq. 66's amounts if adaptive."""
    params, x, y = problem
    u, eps1, eps2, rate = forward(params, x), 0.8, 0.1, 0.04
    losses = cross_entropy(u, y)
    hard = hardest(losses, 6)
    tau = losses[hard].min()
    ratio = losses / tau if adaptive else np.ones(B)
    ball = (np.maximum(2 - ratio, 0) if adaptive else np.ones(B))[:, None]
    delta = np.zeros((B, D))
    if random_starts:
        key = jax.random.fold_in(jax.random.key(0), 0)
        draw = jax.vmap(lambda k: jax.random.uniform(k, (D,), jnp.float64, -1.0, 1.0))
        delta = np.asarray(draw(pj.per_sample_keys(key, 10 * jnp.arange(B)))) * eps2 * ball
        delta = np.clip(x + delta, 0, 1) - x
    for _ in range(3):
        delta = np.clip(delta + rate * ball * np.sign(slope(params, x + delta, y)), -eps2 * ball, eps2 * ball)
        delta = np.clip(x + delta, 0, 1) - x
    expected = np.where(hard[:, None], x, x + delta)
    link = pj.mixpert(eps1=eps1, eps2=eps2, pro=50, step_size=rate, num_steps=3, adaptive=adaptive, random_starts=random_starts)
    out, _, seen = run(problem, link)
    np.testing.assert_allclose(seen, expected, atol=1e-7)
    moved = forward(params, expected)
    moved = np.where(hard[:, None], moved + (eps1 * ratio)[:, None] * (np.eye(C)[y] - softmax(moved)), moved)
    np.testing.assert_allclose(out.losses, cross_entropy(moved, y), rtol=1e-6)
    assert (np.asarray(out.losses)[hard] < losses[hard]).all() and (np.asarray(out.losses)[~hard] >= losses[~hard]).all()


def test_without_hard_samples_it_is_adversarial_training(problem):
    """ "When τ > max l_i … the whole loss becomes the adversarial training loss"."""
    kw = dict(step_size=0.04, num_steps=3, random_starts=False)
    ours, grads, seen = run(problem, pj.mixpert(eps2=0.1, tau=jnp.inf, **kw))
    theirs, other, expected = run(problem, pj.adversarial_training(bound=0.1, **kw))
    np.testing.assert_allclose(seen, expected, atol=1e-12)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), grads, other)


def test_without_input_bound_and_hard_samples_it_is_plain_training_bit_for_bit(problem):
    out, grads, _ = run(problem, pj.mixpert(tau=jnp.inf, eps2=0))
    plain, others, _ = run(problem, ())
    np.testing.assert_array_equal(out.losses, plain.losses)
    jax.tree.map(np.testing.assert_array_equal, grads, others)


def test_pgd_on_the_easy_samples_alone_is_pgd_on_all(problem):
    """Computing only what is used changes no number, for a net whose samples don't see each other."""
    kw = dict(eps2=0.1, pro=50, adaptive=True, clean_weight=0.4)
    some, all_of_them = (run(problem, pj.mixpert(most=most, **kw)) for most in (None, 100))
    np.testing.assert_allclose(some[2], all_of_them[2], atol=1e-12)
    np.testing.assert_allclose(some[0].losses, all_of_them[0].losses, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), some[1], all_of_them[1])
    assert some[0].metrics["mixpert/inner_evaluations"] < all_of_them[0].metrics["mixpert/inner_evaluations"]


def test_work_is_proportional_to_what_is_perturbed():
    """Floating-point operations of a deep net against 1 + (2T/3)·share, where the first layer's input has no gradient in plain training."""
    width, layers, batch, steps = 128, 6, 64, 5

    def deep(w, x):
        for i in range(layers):
            x = jnp.tanh(x @ w[f"w{i}"])
        return x @ w["out"]

    shapes = {f"w{i}": jnp.zeros([width, width]) for i in range(layers)} | {"out": jnp.zeros([width, C])}
    x, y = jnp.zeros([batch, width]), jnp.zeros([batch], jnp.int32)

    def flops(link):
        made = pj.objective(deep, link, num_classes=C)
        states = made.init(shapes, x)
        cost = jax.jit(jax.grad(made, has_aux=True)).lower(shapes, states, pj.batch(x, y)).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    plain = flops(())
    assert flops(pj.mixpert(eps2=0)) < 1.02 * plain
    for pro in (15.0, 35.0):
        ideal = 1 + steps * 2 * layers * (1 - pro / 100) / (3 * layers - 1)
        assert flops(pj.mixpert(eps2=0.1, pro=pro, num_steps=steps, value_range=None)) < 1.1 * ideal * plain


def test_gradient_is_the_finite_difference_with_both_deltas_held(problem):
    params, x, y = problem
    out, grads, seen = run(problem, pj.mixpert(eps1=0.8, eps2=0.1, pro=50, clean_weight=0.4))
    held = np.asarray(out.logits) - forward(params, seen)
    easy = np.abs(held).max(1) < 1e-12

    def loss(params):
        perturbed, clean = cross_entropy(forward(params, seen) + held, y), cross_entropy(forward(params, x), y)
        return np.where(easy, 0.6 * perturbed + 0.4 * clean, perturbed).mean()

    np.testing.assert_allclose(out.losses.mean(), loss(params), rtol=1e-9)
    for name, value in params.items():
        steps = 1e-6 * np.eye(value.size).reshape(-1, *value.shape)
        numeric = [(loss(params | {name: value + e}) - loss(params | {name: value - e})) / 2e-6 for e in steps]
        np.testing.assert_allclose(grads[name], np.reshape(numeric, value.shape), atol=1e-7)


def test_inputs_in_other_units(problem):
    """units: ε₂ in standard deviations of the channels (the official code's), unclipped with value_range=None."""
    params, x, y = problem
    units = np.linspace(0.5, 3.0, D)
    *_, seen = run(problem, pj.mixpert(eps2=0.1, step_size=0.1, pro=0, num_steps=1, units=tuple(units), value_range=None))
    np.testing.assert_allclose(seen, x + 0.1 * units * np.sign(slope(params, x, y)), atol=1e-9)
    assert seen.min() < 0 or seen.max() > 1
    *_, clipped = run(problem, pj.mixpert(eps2=0.1, step_size=0.1, pro=0, num_steps=1))
    assert clipped.min() >= 0 and clipped.max() <= 1


def test_other_sites_can_be_moved(problem):
    params, x, y = problem
    see = pj.Perturbation("stage1", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(MODEL, pj.chain(pj.mixpert(eps2=2.0, site="stage1", pro=0), see), num_classes=C)
    _, out = made(params, made.init(params, x), pj.batch(x, jnp.asarray(y)))
    moved = np.abs(np.asarray(out.metrics["seen/value"]) - np.tanh(x @ params["a"])).max()
    assert 1.5 < moved <= 2 + 1e-9


def test_structure_follows_from_the_numbers():
    """eps2 = 0 is another program than eps2 > 0; all positive ones share one."""
    split = lambda text: spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())[0]
    assert split("mixpert(eps2=8/255)") == split("mixpert(eps2=0.1, eps1=3)") == split("mixpert(eps2=0.1, pro=15)")
    assert split("mixpert(eps2=0)") == split("mixpert") != split("mixpert(eps2=0.1)")
    assert split("mixpert(eps2=0.1, clean_weight=0.4)") != split("mixpert(eps2=0.1)") != split("mixpert(eps2=0.1, pro=30)")
    assert len(pj.chain(pj.mixpert())) == 1 and len(pj.chain(pj.mixpert(eps2=0.1))) == 2


def test_all_hard_leaves_the_inputs_alone(problem):
    _, x, _ = problem
    out, _, seen = run(problem, pj.mixpert(eps2=0.1, pro=100))
    np.testing.assert_array_equal(seen, x)
    np.testing.assert_allclose(out.losses, run(problem, pj.mixpert(eps2=0, pro=100))[0].losses, rtol=1e-12)


def test_the_official_settings_run(problem):
    params, x, y = problem
    link = pj.mixpert(
        eps1=3, eps2=8 / 255, step_size=2 / 255, random_starts=True, clean_weight=0.4, value_range=None, units=(0.2,) * D
    )
    out, _, seen = run(problem, link)
    assert np.abs(seen - x).max() <= 0.2 * 8 / 255 + 1e-12 and np.isfinite(out.losses).all()
    assert out.metrics["mixpert/inner_evaluations"] > 5


def test_errors_say_what_was_given(problem):
    params, x, y = problem
    with pytest.raises(ValueError, match="mixpert needs 0 <= pro <= 100, got 120"):
        pj.mixpert(pro=120)
    with pytest.raises(ValueError, match="mixpert needs tau >= 0, got -1"):
        pj.mixpert(tau=-1)
    with pytest.raises(ValueError, match="mixpert needs tau > 0, got 0"):
        pj.mixpert(tau=0, adaptive=True)
    with pytest.raises(ValueError, match="mixpert needs eps1 >= 0, got -2"):
        pj.mixpert(eps1=-2)
    with pytest.raises(ValueError, match="mixpert needs eps2 <= 1, got 8: .* Write eps2=8/255 if you count in grey"):
        pj.mixpert(eps2=8)
    with pytest.raises(ValueError, match="mixpert needs form to be one of its names, got 'box'"):
        pj.mixpert(form="box")
    with pytest.raises(ValueError, match="mixpert needs passes when eps2 or clean_weight is traced"):
        jax.jit(lambda e: pj.mixpert(eps2=e) and e)(0.1)
    with pytest.raises(ValueError, match=r"mixpert_delta needs finite logits, got inf at \[0, 1\]"):
        pj.mixpert_delta(jnp.array([[0.0, jnp.inf]]), jnp.array([0]), bound=1.0)
    tokens = pj.objective(lambda w, x: w[x].mean(1), pj.mixpert(eps2=0.1), num_classes=C)
    with pytest.raises(ValueError, match="mixpert needs floating values at the site 'input' for eps2 > 0, got int32"):
        tokens(jnp.zeros([9, C]), ((), ()), pj.batch(jnp.zeros([B, 3], jnp.int32), jnp.asarray(y)))
