"""perturbjax.loss.dann: the reversed gradient, the classifier's own step, and that it learns to tell domains apart."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.loss.dann import DANNState
from tests.loss.problem import DEEP, B, C, assert_close, cross_entropy, deep, difference, log_softmax, onehot, run

DOMAINS = np.array([0, 1, 2, 0, 1, 2, 0], np.int32)
SETTINGS = dict(settings=dict(num_domains=3), side={"domain": jnp.asarray(DOMAINS)})


def classified(layers, a):
    """ℓ^dom [B] in numpy: two layers with a ReLU between."""
    (w, b), (v, c) = layers
    return cross_entropy(np.maximum(a @ w + b, 0) @ v + c, np.eye(3)[DOMAINS])


@pytest.fixture
def problem():
    with deep() as found:
        yield found


def start(params, x, link):
    """The link's state with a classifier in float64 whose biases are not zero."""
    [state] = pj.objective(DEEP, link, num_classes=C, num_domains=3).init(params, x)
    rng = np.random.default_rng(2)
    wide = lambda tree: jax.tree.map(lambda w: jnp.asarray(np.asarray(w, float) + 0.1 * rng.normal(size=w.shape)), tree)
    moments = jax.tree.map(lambda m: m.astype(jnp.float64) if m.dtype == jnp.float32 else m, state.moments)
    return DANNState(wide(state.layers), moments)


def test_the_network_climbs_and_the_classifier_descends_the_domain_loss(problem):
    params, x, y = problem
    link = pj.dann(weight=0.8, step_size=0.02, width=4, depth=2)
    state = start(params, x, link)
    layers = jax.tree.map(np.asarray, state.layers)
    out, grad = run(params, x, y, link, model=DEEP, states=(state,), **SETTINGS)
    features = lambda p: np.tanh(x @ p["a"])

    def loss(p):
        return cross_entropy(features(p) @ p["w"].T + p["b"], onehot(y)) - 0.8 * classified(layers, features(p))

    np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9)
    assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-8)
    # Adam's first step moves every parameter by the step size against the sign of its gradient, to ε = 1e-8.
    (w, b), (v, c) = layers
    named = dict(w=w, b=b, v=v, c=c)
    slope = difference(lambda p: classified(((p["w"], p["b"]), (p["v"], p["c"])), features(params)).mean(), named)
    (w2, b2), (v2, c2) = out.states[0].layers
    for name, after in dict(w=w2, b=b2, v=v2, c=c2).items():
        large = np.abs(slope[name]) > 1e-4
        np.testing.assert_allclose((after - named[name])[large], (-0.02 * np.sign(slope[name]))[large], rtol=1e-3)
        np.testing.assert_allclose(after, named[name], atol=0.0201)


def test_the_second_step_is_adam_with_half_the_momentum(problem):
    params, x, y = problem
    link = pj.dann(step_size=0.01, width=4, depth=2)
    state = start(params, x, link)
    grads, layers = [], [state.layers]
    mean = lambda theta: pj.domain_losses(theta, jnp.tanh(x @ params["a"]), jnp.asarray(DOMAINS)).mean()
    for _ in range(2):
        grads.append(jax.grad(mean)(layers[-1]))
        out, _ = run(params, x, y, link, model=DEEP, states=(state,), **SETTINGS)
        [state] = out.states
        layers.append(state.layers)

    def expected(w, g1, g2):
        m, v = 0.5 * 0.5 * g1 + 0.5 * g2, 0.999 * 0.001 * g1**2 + 0.001 * g2**2
        return w - 0.01 * (m / (1 - 0.5**2)) / (jnp.sqrt(v / (1 - 0.999**2)) + 1e-8)

    assert_close(layers[2], jax.tree.map(expected, layers[1], *grads), rtol=1e-5, atol=1e-7)


def test_domain_bed_s_second_moment_and_gradient_penalty(problem):
    """ℓ^dom + g·‖∂ℓ^dom/∂a‖² of each sample, for the features and for the classifier, and two steps of Adam with β₂ = 0.9."""
    params, x, y = problem
    link = pj.dann(weight=0.8, step_size=0.02, square_decay=0.9, gradient_penalty=0.7, width=4, depth=2)
    state = start(params, x, link)
    features = lambda p: np.tanh(x @ p["a"])

    def penalised(theta, a):
        """By hand: ∂ℓ/∂a = W(1[z > 0] ⊙ V(softmax − y))."""
        (w, b), (v, c) = theta
        hidden = a @ w + b
        residual = np.exp(log_softmax(np.maximum(hidden, 0) @ v + c)) - np.eye(3)[DOMAINS]
        slope = ((hidden > 0) * (residual @ v.T)) @ w.T
        return classified(theta, a) + 0.7 * (slope**2).sum(1)

    named = lambda layers: dict(zip("wbvc", [np.asarray(z) for pair in layers for z in pair], strict=True))
    layered = lambda p: ((p["w"], p["b"]), (p["v"], p["c"]))
    theta, m, v = named(state.layers), 0.0, 0.0
    m, v = ({k: 0 * z for k, z in theta.items()} for _ in range(2))
    for number in (1, 2):
        out, grad = run(params, x, y, link, model=DEEP, states=(state,), **SETTINGS)

        def loss(p, theta=theta):
            plain = cross_entropy(features(p) @ p["w"].T + p["b"], onehot(y))
            return plain - 0.8 * penalised(layered(theta), features(p))

        np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9)
        assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-7)
        slope = difference(lambda p: penalised(layered(p), features(params)).mean(), theta)
        m = {k: 0.5 * m[k] + 0.5 * slope[k] for k in theta}
        v = {k: 0.9 * v[k] + 0.1 * slope[k] ** 2 for k in theta}
        theta = {k: theta[k] - 0.02 * m[k] / (1 - 0.5**number) / (np.sqrt(v[k] / (1 - 0.9**number)) + 1e-8) for k in theta}
        [state] = out.states
        large = {k: np.abs(slope[k]) > 1e-4 for k in theta}  # the rest is 0/0 to the rounding of the differences
        for k, after in named(state.layers).items():
            np.testing.assert_allclose(after[large[k]], theta[k][large[k]], rtol=1e-6, atol=1e-7)
        theta = named(state.layers)


def test_a_gradient_penalty_of_zero_is_none(problem):
    params, x, y = problem
    links = [pj.dann(width=4, depth=2, gradient_penalty=g) for g in (None, 0.0)]
    (none, grad), (zero, grad0) = (
        run(params, x, y, link, model=DEEP, states=(start(params, x, link),), **SETTINGS) for link in links
    )
    np.testing.assert_allclose(zero.losses, none.losses, rtol=1e-14)
    assert_close(grad0, grad, rtol=1e-12, atol=1e-15)
    assert_close(zero.states[0].layers, none.states[0].layers, rtol=1e-10, atol=1e-12)


def test_the_classifier_learns_domains_that_can_be_told_apart():
    """With the network at rest its loss falls far below that of guessing, log D."""
    rng = np.random.default_rng(0)
    domains = jnp.arange(30) % 3
    x = jnp.asarray(np.eye(5)[np.arange(30) % 3] + 0.1 * rng.normal(size=(30, 5)), jnp.float32)
    params = dict(a=jnp.eye(5), w=jnp.zeros([C, 5]), b=jnp.zeros([C]))
    made = pj.objective(DEEP, pj.dann(weight=0.0, width=16, step_size=0.01), num_classes=C, num_domains=3)
    data = pj.batch(x, jnp.zeros([30], jnp.int32), side={"domain": domains})
    step = jax.jit(lambda states: made(params, states, data)[1])
    states = made.init(params, x)
    first = float(step(states).metrics["dann/domain_loss"])
    for _ in range(60):
        out = step(states)
        states = out.states
    assert abs(first - np.log(3)) < 0.3 and out.metrics["dann/domain_loss"] < 0.1


def test_padding_belongs_to_no_domain():
    layers = pj.discriminator_init(jax.random.key(0), (3, 4, 2))
    np.testing.assert_array_equal(pj.domain_losses(layers, jnp.ones([2, 3]), jnp.array([-1, 2])), 0.0)


def test_any_site_will_do():
    """A site with positions is flattened; the classifier takes its shape."""
    maps = pj.line({"stage1": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w})
    made = pj.objective(maps, pj.dann(site="stage1", width=7, depth=3), num_classes=C, num_domains=2)
    [state] = made.init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
    assert [w.shape for w, _ in state.layers] == [(36, 7), (7, 7), (7, 2)]


def test_errors_say_what_was_given():
    for settings, message in [
        (dict(weight=-1.0), "dann needs weight >= 0, got -1"),
        (dict(step_size=-1.0), "dann needs step_size >= 0"),
        (dict(decay=1.0), "dann needs 0 <= decay <= 0.999, got 1"),
        (dict(square_decay=1.0), "dann needs 0 <= square_decay <= 0.999999, got 1"),
        (dict(gradient_penalty=-1.0), "dann needs gradient_penalty >= 0, got -1"),
        (dict(depth=0), "dann needs depth >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.dann(**settings)
    with pytest.raises(ValueError, match="dann needs 'domains', got none"):
        pj.objective(DEEP, pj.dann(), num_classes=C)
    params = dict(a=jnp.ones([5, 6]), w=jnp.ones([C, 6]), b=jnp.ones([C]))
    with pytest.raises(ValueError, match="dann needs at least 2 training domains, got 1"):
        pj.objective(DEEP, pj.dann(), num_classes=C, num_domains=1).init(params, jnp.ones([B, 5]))


def test_settings_by_position_are_those_of_earlier_versions():
    assert list(inspect.signature(pj.dann).parameters)[:6] == ["weight", "step_size", "decay", "width", "depth", "site"]
