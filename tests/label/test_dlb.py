"""perturbjax.label.dlb: three steps in numpy, the first of which is plain, the gradient through both passes, and BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.feature.mixup import draw_mixing
from tests.label.problem import B, C, D, batches, losses, numeric_gradient, run, softmax, weights

COUNTS = np.arange(1, C + 1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def kl(u, then, t):
    p, q = softmax(then / t), softmax(u / t)
    return (p * np.log(p / q)).sum(1)


def test_three_steps_in_numpy():
    """½CE(new) + ½CE(last) + αT²·KL(then ‖ now), the weights moving in between, as training does."""
    link, states, w = pj.dlb(weight=0.7, temperature=3.0), None, weights()
    last = None
    for x, y, _ in batches(3):
        out, grad = run(w, x, y, link, states=states)
        states = out.states

        def loss(w, x=x, y=y, last=last):
            new = losses(x @ w, np.eye(C)[y]).mean()
            if last is None:
                return new
            then_x, then_y, then = last
            again = losses(then_x @ w, np.eye(C)[then_y]).mean() / 2
            return new / 2 + again + 0.7 * 9 * kl(then_x @ w, then, 3.0).mean()

        np.testing.assert_allclose(out.losses.mean(), loss(w), rtol=1e-9)
        np.testing.assert_allclose(grad, numeric_gradient(loss, w), atol=1e-7)
        last = x, y, x @ w
        w = w - 0.5 * np.asarray(grad)


def test_the_first_step_is_plain():
    (x, y, _), w = next(batches(1)), weights()
    (out, grad), (plain, expected) = run(w, x, y, pj.dlb()), run(w, x, y, ())
    np.testing.assert_allclose(out.losses, plain.losses, rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-10)
    assert out.metrics["dlb/distillation"] == 0


def test_sample_weights_belong_to_their_batch():
    (x, y, _), (x2, y2, _) = batches(2)
    w, heavy = weights(), jnp.arange(1.0, B + 1)
    out, _ = run(w, x, y, pj.dlb(weight=0.0), weights=heavy)
    out, _ = run(w, x2, y2, pj.dlb(weight=0.0), states=out.states)
    expected = losses(x2 @ w, np.eye(C)[y2]).mean() / 2 + (np.arange(1, B + 1) * losses(x @ w, np.eye(C)[y])).mean() / 2
    np.testing.assert_allclose(out.losses.mean(), expected, rtol=1e-9)


def one_hot(y):
    return np.eye(C)[y]


KNOWING = {
    # what a link makes of the logits u of samples with labels y, and whether the distillation sees it
    "adjusted": (lambda: pj.logit_adjustment(), lambda u, y: u + np.log(COUNTS / COUNTS.sum()), True),
    "margins": (lambda: pj.cosface(margin=0.4, scale=1.0), lambda u, y: u - 0.4 * one_hot(y), False),
}


@pytest.mark.parametrize("order", [1, -1], ids=["dlb first", "dlb last"])
@pytest.mark.parametrize("name", KNOWING)
def test_beside_links_at_the_logits_each_batch_has_its_own_labels(name, order):
    make, logits, seen = KNOWING[name]
    links, states, w, last = pj.chain(*[pj.dlb(weight=0.7, temperature=3.0), make()][::order]), None, weights(), None
    line = pj.line(lambda w, x: x @ w, scale=1.0)
    made = pj.objective(line, links, num_classes=C, class_counts=COUNTS)
    for x, y, _ in batches(3):
        states = made.init(w, jnp.asarray(x)) if states is None else states
        _, out = made(jnp.asarray(w), states, pj.batch(jnp.asarray(x), jnp.asarray(y)))
        states, expected = out.states, losses(logits(x @ w, y), one_hot(y)).mean()
        if last is not None:
            x_then, y_then, u_then = last
            u_now = x_then @ w
            of = (lambda u, y=y_then: logits(u, y)) if seen else (lambda u: u)
            again = losses(logits(u_now, y_then), one_hot(y_then)).mean()
            expected = expected / 2 + again / 2 + 0.7 * 9 * kl(of(u_now), of(u_then), 3.0).mean()
        np.testing.assert_allclose(out.losses.mean(), expected, rtol=1e-9)
        last = x, y, x @ w
        w = w + 0.1


def test_running_statistics_are_those_of_the_new_batch():
    """BatchNorm: the second pass uses its own batch's statistics and leaves the running ones alone."""

    def features(w, x, stats, *, train, key):
        return x - x.mean(0)[None], 0.9 * stats + 0.1 * jax.lax.stop_gradient(x.mean(0))

    line = pj.line({"features": features, "logits": lambda w, a, stats, **_: (a @ w, stats)}, stateful=True)
    made, w = pj.objective(line, pj.dlb(), num_classes=C), jnp.asarray(weights())
    states, stats, expected = made.init(w, jnp.zeros([B, D]), stats=jnp.zeros(D)), jnp.zeros(D), np.zeros(D)
    for x, y, _ in batches(3):
        _, out = made(w, states, pj.batch(jnp.asarray(x), jnp.asarray(y)), stats=stats)
        states, stats, expected = out.states, out.stats, 0.9 * expected + 0.1 * x.mean(0)
    np.testing.assert_allclose(stats, expected, rtol=1e-9)


def test_a_new_view_of_the_last_batch_has_its_own_labels():
    """View 1 of the new batch and view 2 of the last one, as in the authors' code; kept from when both were drawn."""
    link, states, w, last = pj.dlb(weight=0.7, temperature=3.0, view="new"), None, weights(), None
    rng = np.random.default_rng(5)
    for x, y, _ in batches(3):
        other = x + 0.3 * rng.normal(size=x.shape)
        mixed = 0.8 * one_hot(y) + 0.05  # what else is done to the targets of the new batch
        out, _ = run(w, x, y, link, states=states, side={"second_view": jnp.asarray(other)}, targets=jnp.asarray(mixed))
        states, expected = out.states, losses(x @ w, mixed).mean()
        if last is not None:
            then_x, then_y, then = last
            again = losses(then_x @ w, one_hot(then_y)).mean()
            expected = expected / 2 + again / 2 + 0.7 * 9 * kl(then_x @ w, then, 3.0).mean()
        np.testing.assert_allclose(out.losses.mean(), expected, rtol=1e-9)
        last, w = (other, y, x @ w), w + 0.1


def test_where_both_passes_are_mixed_both_have_mixed_targets():
    links, states, w, last = pj.chain(pj.dlb(weight=0.7), pj.mixup(alpha=1.0)), None, weights(), None
    made = pj.objective(pj.line(lambda w, x: x @ w), links, num_classes=C)
    for number, (x, y, _) in enumerate(batches(3)):
        key = jax.random.key(number)
        weight, partner = draw_mixing(jax.random.fold_in(key, 2), B, alpha=1.0)  # mixup is the third link
        blend = lambda values: float(weight) * values + (1 - float(weight)) * values[np.asarray(partner)]
        states = made.init(w, jnp.asarray(x)) if states is None else states
        _, out = made(jnp.asarray(w), states, pj.batch(jnp.asarray(x), jnp.asarray(y)), key=key)
        states, expected = out.states, losses(blend(x) @ w, blend(one_hot(y))).mean()
        if last is not None:
            then_x, then_y, then = last
            now = blend(then_x) @ w
            again = losses(now, blend(one_hot(then_y))).mean()
            expected = expected / 2 + again / 2 + 0.7 * 9 * kl(now, then, 3.0).mean()
        np.testing.assert_allclose(out.losses.mean(), expected, rtol=1e-6)  # λ is drawn in float32
        last, w = (x, y, blend(x) @ w), w + 0.1


def test_a_new_view_has_to_come_from_somebody():
    (x, y, _), w = next(batches(1)), weights()
    with pytest.raises(ValueError, match=r"dlb needs side\['second_view'\] \(8, 5\) for view='new', got none. Write Recipe"):
        run(w, x, y, pj.dlb(view="new"))
    with pytest.raises(ValueError, match=r"got \(8, 4\)"):
        run(w, x, y, pj.dlb(view="new"), side={"second_view": jnp.asarray(x[:, :4])})


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="dlb needs view to be one of its names, got 'fresh'"):
        pj.dlb(view="fresh")
    with pytest.raises(ValueError, match="dlb needs temperature > 0, got 0"):
        pj.dlb(temperature=0)
    with pytest.raises(ValueError, match="dlb needs weight >= 0, got -1"):
        pj.dlb(weight=-1)
