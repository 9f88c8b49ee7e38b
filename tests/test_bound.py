"""perturbjax.bound: every formula of LPL eq. 18, LPG eq. 21 and LPA eqs. 14–15, by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbjax as pj
from perturbjax.bound import check_bound, largest, needs, radius
from perturbjax.classes import running_mean_init
from perturbjax.link import Where
from perturbjax.models import CNN, ResNet

C = 5
COUNTS = np.array([10, 50, 20, 30, 40])
RANK = np.array([5, 1, 4, 3, 2])
Q = np.array([0.2, 0.9, 0.5, 0.6, 0.0], np.float32)  # class 4 has not been seen
SEEN = np.array([1, 1, 1, 1, 0], bool)
CONTEXT = pj.Context(
    num_classes=C,
    class_counts=jnp.asarray(COUNTS),
    where=Where(step=0),
    level=pj.line(ResNet(depth=8, num_classes=C, mean=(0.5,), std=(1.0,))).level,
)
ACCURACY = running_mean_init(C)._replace(mean=jnp.asarray(Q), seen=jnp.asarray(SEEN))


def eps(bound, split=None, state=(), *, default=0.1, **options):
    return radius(bound, default=default, split=split or pj.all_classes(), state=state, context=CONTEXT, **options)


def close(got, expected):
    assert got.shape == (C,)
    np.testing.assert_allclose(got, np.broadcast_to(expected, [C]), rtol=1e-5, atol=1e-7)


def test_fixed():
    close(eps(0.3), 0.3)
    close(eps(np.arange(5.0)), np.arange(5.0))
    close(eps(None), 0.1)
    close(eps(np.inf), np.inf)


@pytest.mark.optax_promotes
def test_a_schedule_of_the_step():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    found = lambda step: radius(
        schedule, default=0.1, split=pj.all_classes(), state=(), context=CONTEXT._replace(where=Where(step=step))
    )
    close(jax.jit(found)(3), 0.3)
    close(found(jnp.int32(20)), 1.0)


def test_a_course_follows_the_progress():
    """From the first number to the last over the run, also inside the layers' scale; its largest value is an end."""
    found = lambda bound, progress, **place: radius(
        bound, default=0.1, split=pj.all_classes(), state=(), context=CONTEXT._replace(where=Where(progress=progress)), **place
    )
    course = pj.linear(first=0.4, last=0.1)
    for progress, value in ((0.0, 0.4), (0.5, 0.25), (1.0, 0.1)):
        close(jax.jit(lambda p: found(course, p))(progress), value)
        close(found(pj.layer_scaled(course, beta=0.5), progress, site="stage3"), 0.5 * value)
    close(found(pj.cosine(first=2.0), 0.5), 1.0)
    assert largest(course, default=1.0) == largest(pj.layer_scaled(pj.cosine(first=0.1, last=0.4)), default=1.0) == 0.4
    jax.jit(lambda x: largest(pj.linear(first=x), default=1.0) is None and x)(1.0)
    assert needs(course, pj.by_accuracy()) == ()


NEGATIVE = {
    "schedule": lambda: lambda step: jnp.where(step < 3, 0.3, -0.3),
    "classes": lambda: lambda step: jnp.where(step < 3, 0.3, jnp.array([0.3, 0.1, 0.1, 0.1, -0.3])),
    "nan": lambda: lambda step: jnp.where(step < 3, 0.3, jnp.nan),
    "layers": lambda: pj.layer_scaled(lambda step: jnp.where(step < 3, 0.3, -0.3)),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_schedule_that_turns_negative_becomes_nan_and_turns_no_direction_round(name):
    bound = NEGATIVE[name]()
    found = jax.jit(
        lambda step: radius(
            bound,
            default=0.1,
            split=pj.all_classes(),
            state=(),
            context=CONTEXT._replace(where=Where(step=step)),
            site="stage3",
        )
    )
    assert np.isfinite(found(2)).all()
    assert np.isnan(found(4)[-1]) and not (np.asarray(found(4)) < 0).any()


def test_a_traced_number_that_is_negative_becomes_nan():
    found = jax.jit(lambda x: (eps(x), eps(pj.varied(eps=x, delta_eps=0.1)), eps(pj.layer_scaled(x), site="stage3")))
    assert np.isnan(found(-0.3)).all() and np.isfinite(found(0.3)).all() and np.isfinite(found(0.0)).all()


X, Y = jax.random.normal(jax.random.key(0), [6, 4]), jnp.arange(6, dtype=jnp.int32) % 3
NET = pj.line({"stage1": lambda w, x: jnp.tanh(x @ w["a"]), "features": lambda w, x: x, "logits": lambda w, x: x @ w["w"]},
              head=lambda w: (w["w"].T, jnp.zeros(3)))  # fmt: skip
PARAMS = {"a": jnp.eye(4), "w": 0.3 * jax.random.normal(jax.random.key(1), [4, 3])}


@pytest.mark.parametrize(
    "make, settings",
    [
        (pj.lpg, dict()),
        (pj.lpg, dict(form="scale")),
        (pj.lpg, dict(inference="pgd")),
        (pj.lpg, dict(inference="pgd", step_size=0.1)),
        (pj.lpl, dict(max_steps=3)),
        (pj.lpl, dict(max_steps=3, num_steps=2, project=True)),
        (pj.lpa, dict(site="stage1")),
        (pj.lpa, dict(site="stage1", step_size=0.1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_whatever_takes_a_bound_has_a_gradient_of_nan_where_it_turns_negative(make, settings):
    """LPG with −ε amplifies what it should dampen, LPL does nothing: neither must go on unseen."""
    link = make(bound=lambda step: jnp.where(step == 4, -0.1, 0.2), direction=1.0, **settings)
    made = pj.objective(NET, link, num_classes=3)
    states = made.init(PARAMS, X)
    gradient = jax.jit(lambda step: jax.grad(made, has_aux=True)(PARAMS, states, pj.batch(X, Y), step=step)[0]["w"])
    assert np.isfinite(gradient(3)).all() and np.isnan(gradient(4)).any()


@pytest.mark.parametrize("tau, at", [("mean", 0.55), ("median", 0.55), (0.7, 0.7), (3.0, 1.0)])
def test_varied_by_accuracy(tau, at):
    """ε + Δε·|τ − q̄_c|; a threshold above everything counts as 1."""
    close(eps(pj.varied(eps=0.2, delta_eps=0.4), pj.by_accuracy(tau=tau), ACCURACY), 0.2 + 0.4 * np.abs(at - Q))


@pytest.mark.parametrize(
    "scale, s, at",
    [
        ("rank", RANK / 5, 0.6),
        ("linear", COUNTS / 50, 30 / 50),
        ("log", np.log(COUNTS / 10) / np.log(5), np.log(30 / 10) / np.log(5)),
    ],
)
def test_varied_by_frequency_as_a_distance_from_the_threshold(scale, s, at):
    split = pj.by_frequency(tau=0.6)
    close(eps(pj.varied(eps=0.2, delta_eps=0.4, statistic=scale), split), 0.2 + 0.4 * np.abs(at - s))


def test_varied_by_variance():
    split, logits = pj.by_variance(update="step"), np.random.default_rng(0).normal(size=[20, C]).astype(np.float32)
    labels = np.arange(20, dtype=np.int32) % 4
    state = jax.jit(lambda state, *clean: split.update(state, pj.split.Clean(*clean), CONTEXT))(
        split.init(CONTEXT), logits, labels, np.eye(C, dtype=np.float32)[labels]
    )
    h = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(C)[labels]
    variance = np.array([h[labels == c].var(0).sum() for c in range(4)])
    expected = np.abs(variance.mean() - variance) / variance.max()
    np.testing.assert_allclose(eps(pj.varied(eps=0.1, delta_eps=2.0), split, state)[:4], 0.1 + 2 * expected, rtol=1e-4)


def test_what_is_left_out_of_varied():
    """No ε: the method's default; no Δε: as large as ε; a split without a statistic: ε alone."""
    share, split = np.abs(0.5 - RANK / 5), pj.by_frequency(tau=0.5)
    close(eps(pj.varied(), split, default=0.3), 0.3 + 0.3 * share)
    close(eps(pj.varied(eps=0.2), split), 0.2 + 0.2 * share)
    close(eps(pj.varied(delta_eps=1.0), split, default=0.3), 0.3 + share)
    close(eps(pj.varied(eps=0.0, delta_eps=2.5), split), 2.5 * share)
    close(eps(pj.varied(eps=0.2, delta_eps=0.4)), 0.2)


def test_varied_by_frequency_of_the_prior():
    """LPL eq. 18, second case with π: head ε + Δε·π_c/π_1, tail ε + Δε·π_C/π_c; class 1 is the first, class 0 the last."""
    head = np.array([0, 1, 0, 0, 1], bool)
    expected = 0.2 + 0.4 * np.where(head, COUNTS / 50, 10 / COUNTS)
    close(eps(pj.varied_by_frequency(eps=0.2, delta_eps=0.4), pj.by_frequency(tau=0.4)), expected)
    close(
        eps(pj.varied_by_frequency(), pj.by_frequency(tau=0.4), default=0.5),
        0.5 + 0.5 * np.where(head, COUNTS / 50, 10 / COUNTS),
    )


def test_varied_by_frequency_of_the_accuracy():
    """As printed, with q̄: q̄_1 is that of the most frequent class (0.9), q̄_C that of the rarest (0.2); no ratio above 1."""
    split = pj.by_accuracy(tau=0.55)  # classes 0 and 2 are raised, class 4 has no direction
    with np.errstate(divide="ignore"):
        expected = 0.2 + 0.4 * np.where([0, 1, 0, 1, 0], Q / 0.9, np.minimum(0.2 / Q, 1))
    found = eps(pj.varied_by_frequency(eps=0.2, delta_eps=0.4, of="accuracy"), split, ACCURACY)
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5)
    assert np.isfinite(found).all()


def test_varied_by_frequency_of_the_accuracy_with_head_and_tail_by_count():
    """LPL eq. 18, second case as printed: c ≤ τ by the order of the counts, s = q̄; and a split without q̄ is an error."""
    split = pj.by_frequency(tau=0.4, accuracy=pj.by_accuracy())
    head, state = np.array([0, 1, 0, 0, 1], bool), ACCURACY._replace(mean=jnp.array([0.2, 0.9, 0.5, 0.6, 0.8]))
    expected = 0.2 + 0.4 * np.where(head, np.array(state.mean) / 0.9, 0.2 / np.array(state.mean))
    close(eps(pj.varied_by_frequency(eps=0.2, delta_eps=0.4, of="accuracy"), split, state), expected)
    bound = pj.varied_by_frequency(of="accuracy")
    assert needs(bound, split) == ("class_counts",)
    for wrong in (lambda: needs(bound, pj.by_frequency()), lambda: eps(bound, pj.by_frequency())):
        with pytest.raises(
            ValueError, match=r"needs a split that keeps accuracies, got one without. Write split=by_frequency\("
        ):
            wrong()


def test_layer_scaled_exponents_of_a_cifar_resnet():
    """γ_l = β^(L − l): L = 4 with three stages; stage 3 and the features have β¹, stem and input β⁴."""
    exponents = dict(input=4, stem=4, stage1=3, stage2=2, stage3=1, features=1, logits=0)
    assert tuple(exponents) == ResNet(depth=8, num_classes=C, mean=(0.5,), std=(1.0,)).sites
    for site, exponent in exponents.items():
        close(eps(pj.layer_scaled(0.2, beta=0.5), site=site), 0.2 * 0.5**exponent)
        close(eps(pj.layer_scaled(0.2), site=site), 0.2 * 0.7**exponent)


def test_layer_scaled_multiplies_any_other_bound():
    split = pj.by_accuracy(tau=0.7)
    varied = pj.varied(eps=0.2, delta_eps=0.4)
    close(eps(pj.layer_scaled(varied, beta=0.5), split, ACCURACY, site="stage2"), 0.25 * (0.2 + 0.4 * np.abs(0.7 - Q)))
    close(eps(pj.layer_scaled(), site="stage3", default=0.3), 0.7 * 0.3)
    close(eps(pj.layer_scaled(lambda step: step + 1.0, beta=0.5), site="stage3"), 0.5)
    close(eps(pj.layer_scaled(np.inf, beta=0.5), site="stage3"), np.inf)


def test_layers_count_in_every_model():
    levels = pj.line(CNN(num_classes=C, mean=(0.5,), std=(1.0,), width=2))
    stages = [s for s in levels.sites if s.startswith("stage")]
    assert levels.level("logits") - levels.level(stages[-1]) == 1


def test_layer_scaled_needs_a_site():
    with pytest.raises(ValueError, match="layer_scaled needs a site"):
        eps(pj.layer_scaled(0.2))


def test_largest():
    assert largest(0.3, default=1.0) == 0.3
    assert largest(np.array([0.1, 0.4]), default=1.0) == 0.4
    assert largest(None, default=1.0) == 1.0
    np.testing.assert_allclose(largest(pj.varied(eps=0.2, delta_eps=0.5), default=1.0), 0.7)
    np.testing.assert_allclose(largest(pj.varied(eps=np.array([0.2, 0.3]), delta_eps=0.5), default=1.0), 0.8)
    assert largest(pj.varied(), default=1.0) == largest(pj.varied_by_frequency(), default=1.0) == 2.0
    assert largest(pj.layer_scaled(0.3), default=1.0) == 0.3
    assert largest(lambda step: 0.1, default=1.0) is None
    assert largest(pj.layer_scaled(lambda step: 0.1), default=1.0) is None

    @jax.jit
    def traced(x):
        assert largest(x, default=1.0) is None and largest(pj.varied(eps=x), default=1.0) is None
        assert largest(pj.layer_scaled(x), default=1.0) is None
        return x

    traced(1.0)


@given(
    st.lists(st.integers(0, 9), min_size=C, max_size=C), st.lists(st.integers(1, 9), min_size=C, max_size=C), st.integers(0, 3)
)
@settings(max_examples=30)
def test_no_bound_exceeds_the_largest(q, counts, tau):
    context = CONTEXT._replace(class_counts=jnp.asarray(counts))
    state = running_mean_init(C)._replace(mean=jnp.asarray(q, jnp.float32) / 9, seen=jnp.ones([C], bool))
    for split in (pj.by_accuracy(tau=tau), pj.by_frequency(tau=min(tau / 3, 1.0), accuracy=pj.by_accuracy())):
        bounds = [pj.varied(eps=0.2, delta_eps=0.5), pj.varied_by_frequency(eps=0.2, delta_eps=0.5)]
        bounds += [pj.varied_by_frequency(eps=0.2, delta_eps=0.5, of="accuracy")] * (tau > 0)
        for bound in bounds:
            found = radius(bound, default=1.0, split=split, state=state, context=context)
            assert (0.2 - 1e-6 <= found).all() and (found <= largest(bound, default=1.0) + 1e-6).all()


def test_what_a_bound_needs():
    counts = ("class_counts",)
    assert needs(0.1, pj.by_accuracy()) == needs(pj.varied(), pj.by_accuracy()) == ()
    assert needs(0.1, pj.by_frequency()) == counts
    assert needs(pj.varied_by_frequency(), pj.by_accuracy()) == counts
    assert needs(pj.layer_scaled(pj.varied_by_frequency()), pj.by_accuracy()) == counts


@pytest.mark.parametrize("make", [pj.lpl, pj.lpg, pj.lpa], ids=lambda f: f.__name__)
def test_a_varied_bound_takes_no_threshold_beyond_all_accuracies(make):
    """Clipped to 1, τ = 1.5 would give other bounds than eq. 18; bounds that are not made of τ take it (all classes are raised)."""
    for bound in (pj.varied(0.1, 0.2), pj.layer_scaled(pj.varied())):
        with pytest.raises(ValueError, match=r"varied needs a split whose tau is in \[0, 1\], .*, got 1\.5\. Write tau=1\."):
            make(bound=bound, split="accuracy", tau=1.5)
        make(bound=bound, split="accuracy", tau=1.0)
    make(bound=0.1, split="accuracy", tau=1.5)
    make(bound=pj.varied(), split=pj.by_frequency(rule="count", tau=20))  # samples, not a share


def test_a_known_threshold_is_looked_at_within_a_trace():
    tau = jnp.float32(0.5)
    jax.make_jaxpr(lambda x: (pj.lpl(split=pj.by_accuracy(tau), bound=pj.varied(0.1, 0.2)), x)[1])(1.0)


def test_a_traced_threshold_beyond_all_accuracies_gives_nan():
    found = jax.jit(lambda tau: eps(pj.varied(eps=0.2, delta_eps=0.4), pj.by_accuracy(tau=tau), ACCURACY))
    assert np.isnan(found(1.5)).all()
    close(found(0.7), 0.2 + 0.4 * np.abs(0.7 - Q))


def test_bounds_that_pass():
    for bound in (0, 0.5, np.inf, np.ones(3), None, pj.varied(), pj.layer_scaled(0.1), pj.layer_scaled(), lambda step: 0.1):
        check_bound("f", bound)
    jax.jit(lambda x: check_bound("f", x))(-1.0)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: check_bound("lpl", -0.1), "lpl needs bound >= 0, got -0.1"),
        (lambda: check_bound("lpl", float("nan")), "lpl needs bound >= 0, got nan"),
        (lambda: check_bound("lpl", np.array([0.1, -1.0])), "lpl needs bound >= 0"),
        (lambda: check_bound("lpl", "large"), "lpl needs a number for bound, got 'large'"),
        (lambda: check_bound("lpa", pj.layer_scaled(-0.1)), "lpa needs bound >= 0, got -0.1"),
        (lambda: pj.lpg(bound=lambda step: -0.1 + 0 * step), "lpg needs bound >= 0 at every step, got -0.1 at step 0"),
        (
            lambda: check_bound("lpg", lambda step: np.array([1.0, -1.0])),
            r"lpg needs bound >= 0 at every step, got \[ 1. -1.\]",
        ),
        (lambda: check_bound("lpg", pj.linear(first=0.1, last=-0.1)), "lpg needs bound >= 0, got -0.1"),
        (lambda: check_bound("lpg", pj.by_rate()), "lpg needs bound to follow the progress, got by_rate"),
        (lambda: pj.varied(eps=-0.1), "varied needs eps >= 0, got -0.1"),
        (lambda: pj.varied(delta_eps=-0.1), "varied needs delta_eps >= 0"),
        (lambda: pj.varied(statistic="logs"), "varied needs statistic .* got 'logs'. Did you mean 'log'"),
        (lambda: pj.varied_by_frequency(delta_eps=-1), "varied_by_frequency needs delta_eps >= 0"),
        (lambda: pj.varied_by_frequency(of="priors"), "varied_by_frequency needs of .* Did you mean 'prior'"),
        (lambda: pj.layer_scaled(beta=0), "layer_scaled needs 0 < beta <= 1, got 0"),
        (lambda: pj.layer_scaled(beta=1.1), "layer_scaled needs 0 < beta <= 1, got 1.1"),
    ],
)
def test_wrong_bounds(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
