"""Stochastic depth, ShakeDrop and Shake-Shake: factors drawn per sample, another draw in the backward pass, expectations at evaluation."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from experiments import shared
from perturbjax.models import ResNet, ShakeResNet, WideResNet, create
from perturbjax.models.blocks import Ops
from perturbjax.models.conv import conv_general_dilated
from perturbjax.models.describe import describe, from_description
from perturbjax.models.resnet import TwoBranchBlock
from perturbjax.models.shake import Branch, Scaled, Shaken, branch_factors, branches, scaled

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODELS = {
    "stochastic depth": ResNet(depth=8, width=2, stochastic_depth=0.8, **SHARED),
    "wide shakedrop": WideResNet(depth=10, width=2, widen=2, shakedrop=0.8, **SHARED),
    "shake-shake": ShakeResNet(depth=8, width=2, **SHARED),
}
RNGS = {"dropout": jax.random.key(1, impl="unsafe_rbg")}  # compiles faster than threefry
MANY = 20000


def variables_of(model):
    random = np.random.default_rng(1)
    tree = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.5, leaf.shape) ** 2, leaf.dtype), tree)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def apply(model, variables, value=IMAGES, *, seed=1, **options):
    rngs = {"dropout": jax.random.key(seed, impl="unsafe_rbg")}
    out, new = model.apply(variables, value, mutable=["batch_stats"], rngs=rngs, **options)
    return out, variables | new


def near(mean, expected, deviation, count=MANY):
    assert abs(mean - expected) < 4 * deviation / np.sqrt(count)


def test_forward_and_backward_have_their_own_factors():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
    forward, backward = jnp.array([2.0, 0.0, -1.0]), jnp.array([0.5, 3.0, 1.0])
    out, pull = jax.vjp(scaled, jnp.asarray(x), forward, backward)
    np.testing.assert_array_equal(out, np.asarray(forward)[:, None, None] * x)
    to_x, *to_factors = pull(jnp.asarray(g))
    np.testing.assert_array_equal(to_x, np.asarray(backward)[:, None, None] * g)
    for zero in to_factors:
        np.testing.assert_array_equal(zero, 0)


def test_equal_factors_are_the_ordinary_gradient():
    factor, x = jnp.array([0.3, 1.0, -2.0]), jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    ours = jax.grad(lambda x: jnp.sin(scaled(x, factor, factor)).sum())(x)
    np.testing.assert_allclose(ours, jax.grad(lambda x: jnp.sin(factor[:, None] * x).sum())(x), rtol=1e-6)


def test_a_search_before_a_branch_follows_the_backward_factors():
    """As shake.py says: δ of one raw step is the loss's gradient at α x with β for α, here of the other sign for the first sample."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    alpha, beta, y = jnp.array([-0.8, 0.5, 1.0]), jnp.array([0.6, 0.1, 1.0]), np.array([0, 2, 1])
    at = pj.adversarial_training(
        bound=10.0, step_size=1.0, num_steps=1, norm="l2", step="raw", value_range=None, random_starts=False
    )
    see = pj.Perturbation("input", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(lambda w, x: scaled(x, alpha, beta) @ w, pj.chain(at, see), num_classes=3)
    _, out = made(w, made.init(w, x), pj.batch(x, y))
    p = np.exp(u := np.asarray(alpha)[:, None] * x @ w) / np.exp(u).sum(1, keepdims=True)
    np.testing.assert_allclose(
        out.metrics["seen/value"] - x, np.asarray(beta)[:, None] * ((p - np.eye(3)[y]) @ w.T), rtol=1e-4, atol=1e-6
    )


def test_the_rate_rises_linearly_to_the_last_block():
    for model, count in ((MODELS["stochastic depth"], 3), (create("resnet20", shakedrop=0.5, **SHARED), 9)):
        rates = [branch.rate for branch in model.branches]
        last = model.shakedrop or model.stochastic_depth
        np.testing.assert_allclose(rates, last * np.arange(1, count + 1) / count)
    assert branches("shakedrop", 0.5, 4)[0] == Branch("shakedrop", 0.125)


def test_stochastic_depth_keeps_whole_branches_with_probability_p():
    forward, backward = branch_factors(jax.random.key(0), MANY, Branch("stochastic_depth", 0.3))
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(np.unique(forward), [0, 1])
    near(forward.mean(), 0.7, np.sqrt(0.21))


def test_shakedrop_s_factors_have_the_moments_of_the_paper():
    """b + α − bα is 1 with probability p, else α ~ U(−1, 1); backward with β ~ U(0, 1)."""
    forward, backward = map(np.asarray, branch_factors(jax.random.key(0), MANY, Branch("shakedrop", 0.4)))
    kept = forward == 1
    near(kept.mean(), 0.6, np.sqrt(0.24))
    np.testing.assert_array_equal(backward[kept], 1)
    alpha, beta = forward[~kept], backward[~kept]
    near(alpha.mean(), 0, np.sqrt(1 / 3), alpha.size)
    near((alpha**2).mean(), 1 / 3, 0.3, alpha.size)
    near(beta.mean(), 0.5, np.sqrt(1 / 12), beta.size)
    assert -1 <= alpha.min() < -0.99 and alpha.max() > 0.99 and 0 <= beta.min() < 0.01 and 0.99 < beta.max() <= 1
    near((alpha * (beta - 0.5)).mean(), 0, np.sqrt(1 / 36), alpha.size)  # independent
    near(forward.mean(), 0.6, 0.6)  # what evaluation multiplies by


@pytest.mark.parametrize("kind", ["stochastic_depth", "shakedrop"])
def test_evaluation_is_the_expectation_of_training(kind):
    x, branch = jnp.ones([MANY, 1]), Branch(kind, 0.4)
    trained = Scaled(branch, train=True).apply({}, x, rngs=RNGS)
    evaluated = Scaled(branch, train=False).apply({}, x)
    np.testing.assert_allclose(evaluated, 0.6, rtol=1e-6)
    near(trained.mean(), 0.6, 0.6)


def test_shake_shake_mixes_two_branches_with_other_weights_back():
    x, y = jnp.ones([MANY, 1]), jnp.zeros([MANY, 1])
    run = lambda x, y: Shaken(True, True).apply({}, x, y, rngs=RNGS)
    alpha, pull = jax.vjp(run, x, y)  # α·1 + (1 − α)·0
    beta, rest = map(np.asarray, pull(jnp.ones_like(x)))
    np.testing.assert_allclose(beta + rest, 1, rtol=1e-6)
    np.testing.assert_allclose(run(y, x), 1 - alpha, atol=1e-6)
    for factor in (alpha, beta):
        assert 0 <= factor.min() < 0.01 and 0.99 < factor.max() <= 1
        near(factor.mean(), 0.5, np.sqrt(1 / 12))
    near(((alpha - 0.5) * (beta - 0.5)).mean(), 0, 1 / 12)  # independent
    for still in (Shaken(True, False), Shaken(False, True)):
        np.testing.assert_array_equal(still.apply({}, x, 3 * x), 2)


def test_a_block_s_gradient_is_that_of_the_backward_factors():
    """The oracle: the value is that of α F₁ + (1 − α) F₂ + x, the gradient the ordinary one of β F₁ + (1 − β) F₂ + x."""
    ops = Ops(conv_general_dilated, nn.initializers.lecun_normal(), 0.0, jnp.float32, True)
    block, x = TwoBranchBlock(4, 1, ops, True), jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 4)), jnp.float32)
    shapes = jax.eval_shape(block.init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    stats = {f"norm{i}{j}": {"mean": jnp.zeros(4), "var": jnp.ones(4)} for i in (1, 2) for j in (1, 2)}
    run = lambda p, x: block.apply({"params": p, "batch_stats": stats}, x, rngs=RNGS, mutable=["batch_stats"])[0]

    def branch(i, x):
        def pick(next_fun, args, kwargs, context):
            return args[i] if isinstance(context.module, Shaken) else next_fun(*args, **kwargs)

        with nn.intercept_methods(pick):
            return run(params, x) - x

    @jax.jit
    def both(x):
        out, pull = jax.vjp(run, params, x)
        # The last thing of F₁ is a bias: its gradient for one sample is that sample's β at each of the 16 pixels.
        beta = jnp.stack([pull(jnp.zeros_like(x).at[i].set(1))[0]["norm12"]["bias"][0] / 16 for i in range(3)])
        beta = beta[:, None, None, None]
        _, other = jax.vjp(lambda x: beta * branch(0, x) + (1 - beta) * branch(1, x) + x, x)
        return out, branch(0, x), branch(1, x), pull(jnp.cos(x))[1], other(jnp.cos(x))[0], beta

    out, first, second, ours, expected, beta = map(np.asarray, both(x))
    alpha = ((out - x - second) * (first - second)).sum((1, 2, 3)) / ((first - second) ** 2).sum((1, 2, 3))
    alpha = alpha[:, None, None, None]
    np.testing.assert_allclose(out, alpha * first + (1 - alpha) * second + x, atol=1e-4)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    for factor in (alpha, beta):
        assert (factor > 0).all() and (factor < 1).all() and len(np.unique(factor.round(4))) == 3
    assert np.abs(alpha - beta).min() > 1e-3


def test_a_run_draws_per_sample_and_anew_for_each_key(model):
    variables = variables_of(model)
    same = jnp.broadcast_to(IMAGES[:1], IMAGES.shape)
    run = jax.jit(lambda seed: apply(model, variables, same, train=True, seed=0)[0])
    logits = np.asarray(run(0))
    assert np.ptp(logits, axis=0).max() > 1e-3  # equal samples, other factors
    other = np.asarray(jax.jit(lambda: apply(model, variables, same, train=True, seed=5)[0])())
    assert np.abs(other - logits).max() > 1e-3
    still = np.asarray(jax.jit(model.apply)(variables, same))
    np.testing.assert_allclose(still, still[:1].repeat(4, 0), rtol=1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(model, train):
    variables = variables_of(model)
    run = lambda value, variables, **sites: jax.jit(partial(apply, model, train=train, **sites))(variables, value)
    whole, walk = run(IMAGES, variables), (IMAGES, variables)
    for start, stop in zip(model.sites, model.sites[1:]):
        walk = run(*walk, start=start, stop=stop)
    # From JAX 0.12 on, XLA fuses pre-activation blocks across stages, with or without random factors: equal to rounding there.
    exact = jax.__version_info__ < (0, 12) or isinstance(model, ResNet)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-5 * float(jnp.abs(b).max()))
    jax.tree.map(close, walk, whole)


@pytest.mark.slow
def test_remat_draws_the_same_factors():
    def slope(remat):
        model = ShakeResNet(depth=8, width=2, remat=remat, **SHARED)
        params = variables["params"]
        loss = lambda p: (apply(model, variables | {"params": p}, train=True)[0] ** 2).mean()
        return jax.jit(jax.grad(loss))(params)

    variables = variables_of(MODELS["shake-shake"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
    jax.tree.map(close, slope(True), slope(False))


def test_the_variables_are_those_without():
    shapes = lambda **options: jax.eval_shape(ResNet(depth=8, width=2, **options, **SHARED).init, jax.random.key(0), IMAGES)
    assert shapes() == shapes(stochastic_depth=0.5) == shapes(shakedrop=0.5)


def test_a_rate_of_zero_is_the_model_without():
    for options in (dict(stochastic_depth=0.0), dict(shakedrop=0.0)):
        assert create("resnet20", **options, **SHARED) == create("resnet20", **SHARED)
    assert create("resnet20", **SHARED).branches is None


def test_with_all_branches_kept_training_is_the_plain_model():
    """A rate too small for any draw: the same blocks, with the factor 1."""
    plain, tiny = (ResNet(depth=8, width=2, stochastic_depth=rate, **SHARED) for rate in (0.0, 1e-12))
    variables = variables_of(plain)
    ours, theirs = (jax.jit(partial(apply, model, train=True))(variables) for model in (tiny, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "name, options",
    [("resnet20", dict(stochastic_depth=0.5)), ("wrn16-8", dict(shakedrop=0.25)), ("shake26", dict(shake=False))],
)
def test_they_come_back_from_their_description(name, options):
    model = create(name, **options, **SHARED)
    found = from_description(json.loads(json.dumps(describe(model))))
    assert found == model and found != create(name, **SHARED)


def test_shake_resnet_s_shortcut_sees_two_grids_of_pixels():
    """Branches silenced by zero scales: what is left is the shortcut, normalised, of the pixels (2i, 2j) and (2i − 1, 2j − 1)."""
    ops = Ops(conv_general_dilated, nn.initializers.ones, 0.0, jnp.float32, False)
    block, x = TwoBranchBlock(2, 2, ops, True), jnp.abs(IMAGES[..., :1])
    variables = block.init(jax.random.key(0), x)
    params = {
        name: {**leaf, "scale": 0 * leaf["scale"]} if name in ("norm12", "norm22") else leaf
        for name, leaf in variables["params"].items()
    }
    out = block.apply(variables | {"params": params}, x)
    expected = np.concatenate([x[:, ::2, ::2], np.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)])[:, :-1:2, :-1:2]], axis=-1)
    np.testing.assert_allclose(out, expected / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_the_flags_reach_the_model():
    settings = shared.Settings(data="digits", view="none", model="resnet8", shakedrop=0.25)
    dataset = shared.load_view(settings, 0)
    model = shared.make_recipe(settings, dataset, lambda numbers: ()).model
    assert (model.shakedrop, model.stochastic_depth) == (0.25, 0.0)
    for wrong in ("mlp", "shake26", "resnet50"):
        with pytest.raises(
            ValueError, match=f"--stochastic-depth needs --model resnet8 to resnet110, .*got {wrong}. Write --model"
        ):
            shared.branch_options(shared.Settings(model=wrong, stochastic_depth=0.5))


def test_the_shortcut_flag_reaches_the_model():
    for shortcut, kept in (("A", None), ("B", "B")):  # folders of versions without the flag have option A
        settings = shared.Settings(data="digits", view="none", model="resnet8", shortcut=shortcut)
        dataset = shared.load_view(settings, 0)
        assert shared.make_recipe(settings, dataset, lambda numbers: ()).model.shortcut == shortcut
        assert shared.identity(settings, dataset).get("shortcut") == kept
    for wrong in ("la_net", "se_resnet20", "resnet50"):
        with pytest.raises(ValueError, match=f"--shortcut B needs --model resnet8 to resnet110, got {wrong}. Leave it out"):
            shared.branch_options(shared.Settings(model=wrong, shortcut="B"))


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="ResNet needs 0 <= stochastic_depth <= 1, got 1.5"):
        create("resnet20", stochastic_depth=1.5, **SHARED)
    with pytest.raises(ValueError, match="ResNet needs one of stochastic_depth and shakedrop, got both"):
        create("resnet20", stochastic_depth=0.5, shakedrop=0.5, **SHARED)
    with pytest.raises(ValueError, match=r"ShakeResNet needs depth = 6n \+ 2, got 27"):
        ShakeResNet(depth=27, **SHARED)
