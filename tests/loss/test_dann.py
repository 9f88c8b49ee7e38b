"""perturbjax.loss.dann: the reversed gradient, the classifier's own step, and that it learns to tell domains apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.loss.dann import DANNState
from tests.loss.problem import DEEP, B, C, assert_close, cross_entropy, deep, difference, onehot, run

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
        (dict(depth=0), "dann needs depth >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.dann(**settings)
    with pytest.raises(ValueError, match="dann needs 'domains', got none"):
        pj.objective(DEEP, pj.dann(), num_classes=C)
    params = dict(a=jnp.ones([5, 6]), w=jnp.ones([C, 6]), b=jnp.ones([C]))
    with pytest.raises(ValueError, match="dann needs at least 2 training domains, got 1"):
        pj.objective(DEEP, pj.dann(), num_classes=C, num_domains=1).init(params, jnp.ones([B, 5]))
