"""perturbjax.split: which classes are raised and lowered, by the papers' rules in numpy; statistics on [0, 1]."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbjax as pj
from perturbjax.link import Where
from perturbjax.split import SCALES, Clean, as_split, by_loss, by_loss_top

C = 4


def context(epoch=0, **fields):
    return pj.Context(**dict(num_classes=C, where=Where(epoch=epoch)) | fields)


def clean(logits, labels):
    labels = np.asarray(labels, np.int32)
    return Clean(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), jnp.eye(C)[np.clip(labels, 0, C - 1)])


def draw(seed=0, batch=12, classes=C - 1):
    """Random logits; the last class never occurs."""
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=[batch, C]), rng.integers(0, classes, batch)


def softmax(u):
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def after(split, *batches, epochs=None, **fields):
    """State of a split after some batches (logits, labels), each in the epoch given."""
    state = split.init(context(**fields))
    for batch, epoch in zip(batches, epochs or [0] * len(batches), strict=True):
        state = split.update(state, clean(*batch), context(epoch=epoch, **fields))
    return state


def directions(split, *batches, **options):
    return np.asarray(split.direction(after(split, *batches, **options), context()))


def by_class(values, labels):
    return np.array([values[labels == c].mean() if (labels == c).any() else np.nan for c in range(C)])


def measured(logits, labels, measure):
    true = softmax(logits)[np.arange(len(labels)), labels]
    return by_class(true if measure == "probability" else (logits.argmax(1) == labels).astype(float), labels)


# By accuracy.


@pytest.mark.parametrize("measure", ["probability", "top1"])
@pytest.mark.parametrize("tau", ["mean", "median", 0.3])
def test_by_accuracy_over_steps(measure, tau):
    split = pj.by_accuracy(tau=tau, measure=measure, decay=0.7)
    first, second = draw(0), draw(1, classes=2)  # class 2 is absent from the second batch: its mean stays
    q0, q1 = measured(*first, measure), measured(*second, measure)
    q = np.where(np.isnan(q1), q0, 0.7 * q0 + 0.3 * q1)
    state = after(split, first, second)
    np.testing.assert_allclose(state.mean[:3], q[:3], rtol=1e-5)
    threshold = {"mean": np.nanmean(q), "median": np.nanmedian(q)}.get(tau, tau)
    low = q <= threshold + 1e-6 if measure == "probability" else q < threshold - 1e-6  # the median is one of them
    np.testing.assert_array_equal(split.direction(state, context()), [*np.where(low, 1, -1)[:3], 0])
    s, at = split.statistic(state, context(), "rank")
    np.testing.assert_allclose([*s[:3], at], [*q[:3], threshold], rtol=1e-5)


def test_at_the_threshold_a_probability_is_raised_and_an_accuracy_lowered():
    even = np.zeros([3, C]), np.array([0, 1, 2])  # p = 1/4 everywhere, and argmax 0
    np.testing.assert_array_equal(directions(pj.by_accuracy(tau=0.25), even), [1, 1, 1, 0])
    np.testing.assert_array_equal(directions(pj.by_accuracy(tau="mean"), even), [1, 1, 1, 0])
    np.testing.assert_array_equal(directions(pj.by_accuracy(tau=1.0, measure="top1"), even), [-1, 1, 1, 0])
    right = 9 * np.eye(C)[[0, 1, 2]], np.array([0, 1, 2])
    np.testing.assert_array_equal(directions(pj.by_accuracy(measure="top1"), right), [-1, -1, -1, 0])


@pytest.mark.parametrize("measure", ["probability", "top1"])
def test_a_threshold_above_everything_raises_all(measure):
    np.testing.assert_array_equal(directions(pj.by_accuracy(tau=1.5, measure=measure), draw()), [1, 1, 1, 0])


def test_classes_not_seen_are_left_out_of_mean_and_median():
    """With zeros for the class never seen, the mean would be 0.45, the median 0.55."""
    labels = np.array([0, 1, 2])
    p = np.array([[0.5, 0.2, 0.2, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    for tau in ("mean", "median"):
        split = pj.by_accuracy(tau=tau)
        state = after(split, (np.log(p), labels))
        np.testing.assert_allclose(split.statistic(state, context(), "rank")[1], 0.6, rtol=1e-5)


def test_epochs_count_exactly_and_the_first_has_no_direction():
    split = pj.by_accuracy(measure="top1", update="epoch")
    batches = [draw(0), draw(1), draw(2)]
    np.testing.assert_array_equal(directions(split, *batches[:2], epochs=[0, 0]), 0)
    state = after(split, *batches, epochs=[0, 0, 1])
    logits, labels = (np.concatenate(x) for x in zip(*batches[:2]))
    q = measured(logits, labels, "top1")
    np.testing.assert_allclose(state.mean[:3], q[:3], rtol=1e-6)
    np.testing.assert_array_equal(split.direction(state, context()), [*np.where(q < np.nanmean(q), 1, -1)[:3], 0])


def test_of_the_batch_alone_nothing_is_remembered():
    first, second = draw(0), draw(1, classes=2)  # class 2 is absent from the second batch
    split = pj.by_accuracy(update="batch")
    state, q = after(split, first, second), measured(*second, "probability")
    np.testing.assert_allclose(state.mean, np.nan_to_num(q), rtol=1e-5)
    np.testing.assert_array_equal(split.direction(state, context()), [*np.where(q <= np.nanmean(q), 1, -1)[:2], 0, 0])
    np.testing.assert_allclose(split.statistic(state, context(), "rank")[1], np.nanmean(q), rtol=1e-5)


@pytest.mark.parametrize("tau", ["mean", "median"])
def test_over_all_classes_those_not_seen_count_with_zeros(tau):
    """The threshold of LPL's code: with 28 of 100 classes absent from a batch, 0.72 of the true mean."""
    logits, labels = draw(1, classes=2)
    q = np.nan_to_num(measured(logits, labels, "probability"))
    split = pj.by_accuracy(tau=tau, update="batch", over="all")
    state, threshold = after(split, (logits, labels)), {"mean": np.mean, "median": np.median}[tau](q)
    np.testing.assert_allclose(split.statistic(state, context(), "rank")[1], threshold, rtol=1e-5)
    np.testing.assert_array_equal(split.direction(state, context()), np.where(q <= threshold, 1, -1))
    np.testing.assert_array_equal(directions(pj.by_accuracy(tau=0.3, over="all"), (logits, labels)), np.where(q <= 0.3, 1, -1))


def test_before_any_batch_no_class_has_a_direction():
    for split in (pj.by_accuracy(), pj.by_accuracy(tau="median"), pj.by_accuracy(tau=2.0), pj.by_variance()):
        np.testing.assert_array_equal(directions(split), 0)


@pytest.mark.parametrize("label", [-1, C, 99])
@pytest.mark.parametrize("split", [pj.by_accuracy(), pj.by_accuracy(measure="top1"), pj.by_variance(update="step")])
def test_padding_belongs_to_no_class(split, label):
    logits, labels = draw()
    padded = np.concatenate([logits, logits[:2]]), np.concatenate([labels, [label, label]])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after(split, padded),
        after(split, (logits, labels)),
    )


# By frequency.

COUNTS = np.array([10, 50, 10, 30, 50])  # not sorted, with ties


def frequency(counts=COUNTS, **settings):
    split = pj.by_frequency(**settings)
    where = pj.Context(num_classes=len(counts), class_counts=jnp.asarray(counts))
    return split, where, np.asarray(split.direction(split.init(where), where))


@pytest.mark.parametrize("tau, raised", [(0.4, [1, -1, 1, 1, -1]), (0.5, [1, -1, 1, 1, -1]), (0.6, [1, -1, 1, -1, -1])])
def test_by_rank_ties_go_in_the_order_of_the_labels(tau, raised):
    np.testing.assert_array_equal(frequency(tau=tau)[2], raised)
    np.testing.assert_array_equal(frequency(tau=0.2)[2], [1, -1, 1, 1, 1])  # of the two with 50, the first
    np.testing.assert_array_equal(frequency(tau=0.8)[2], [-1, -1, 1, -1, -1])


def test_by_rank_the_half_is_the_default_and_the_ends_are_all_or_none():
    np.testing.assert_array_equal(frequency()[2], frequency(tau=0.5)[2])
    np.testing.assert_array_equal(frequency(tau=0.0)[2], 1)
    np.testing.assert_array_equal(frequency(tau=1.0)[2], -1)


@pytest.mark.parametrize("tau", ["2/5", "1/2", "3/5", "3/10", "7/10", "53/100", "59/100"])
@pytest.mark.parametrize("classes", [5, 7, 10, 100])
def test_by_rank_a_share_is_exact(tau, classes):
    """⌊τC⌋ classes are lowered, whatever float32 makes of the product."""
    lowered = (frequency(np.arange(classes) + 1, tau=float(Fraction(tau)))[2] < 0).sum()
    assert lowered == Fraction(tau) * classes // 1


@given(st.lists(st.integers(1, 6), min_size=5, max_size=5), st.sampled_from([2, 3]))
@settings(max_examples=50)
def test_by_rank_for_any_counts(counts, head):
    order = sorted(range(5), key=lambda c: (-counts[c], c))
    expected = [-1 if c in order[:head] else 1 for c in range(5)]
    np.testing.assert_array_equal(frequency(counts, tau=head / 5)[2], expected)


def test_by_count_below_the_median_or_a_number():
    np.testing.assert_array_equal(frequency(rule="count", tau="median")[2], np.where(COUNTS < np.median(COUNTS), 1, -1))
    np.testing.assert_array_equal(frequency(rule="count", tau=50)[2], [1, -1, 1, 1, -1])
    np.testing.assert_array_equal(frequency(rule="count", tau=51)[2], 1)
    np.testing.assert_array_equal(frequency(rule="count")[2], frequency(rule="count", tau="median")[2])


def test_by_frequency_may_keep_accuracies_beside():
    plain, both = pj.by_frequency(tau=0.5), pj.by_frequency(tau=0.5, accuracy=pj.by_accuracy(decay=0.7))
    alone, where = pj.by_accuracy(decay=0.7), context(class_counts=jnp.array([5, 7, 1, 2]))
    assert plain.accuracy is None and both.needs == plain.needs
    states = [after(split, draw(0), draw(1), class_counts=where.class_counts) for split in (plain, both, alone)]
    np.testing.assert_array_equal(both.direction(states[1], where), plain.direction(states[0], where))
    np.testing.assert_array_equal(both.statistic(states[1], where, "log")[0], plain.statistic(states[0], where, "log")[0])
    np.testing.assert_array_equal(both.accuracy(states[1], where), alone.accuracy(states[2], where))
    with pytest.raises(ValueError, match=r"by_frequency needs accuracy to be a split by accuracy.*accuracy=by_accuracy\(\)"):
        pj.by_frequency(accuracy=pj.by_variance())


def test_the_scales_of_a_frequency():
    rank = np.array([4, 1, 5, 3, 2])
    for tau, edge in ((0.4, 50), (0.6, 30), (0.8, 10)):
        split, where, _ = frequency(tau=tau)
        of = {scale: split.statistic((), where, scale) for scale in SCALES}
        np.testing.assert_allclose(of["rank"][0], rank / 5, rtol=1e-6)
        np.testing.assert_allclose(of["rank"][1], tau, rtol=1e-6)
        np.testing.assert_allclose(of["linear"][0], COUNTS / 50, rtol=1e-6)
        np.testing.assert_allclose(of["linear"][1], edge / 50, rtol=1e-6)
        log = lambda n: np.log(n / 10) / np.log(5)
        np.testing.assert_allclose(of["log"][0], log(COUNTS), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(of["log"][1], log(edge), rtol=1e-5, atol=1e-6)
    split, where, _ = frequency(np.array([1, 0, 10, 100, 10]), tau=0.4)
    np.testing.assert_allclose(split.statistic((), where, "log")[0], [0, 0, 0.5, 1, 0.5], rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "settings", [dict(tau=0.5), dict(tau=0.4), dict(rule="count"), dict(rule="count", tau=40), dict(rule="count", tau=1e6)]
)
@pytest.mark.parametrize("counts", [[3, 70, 20, 500, 41, 8, 100], [9, 5, 2], [5, 5, 5, 5]])
def test_statistic_and_threshold_agree_with_the_direction(counts, settings, scale):
    """Head classes lie on the threshold's head side, tail classes beyond it; both in [0, 1]."""
    split, where, direction = frequency(np.array(counts), **settings)
    s, at = (np.asarray(x) for x in split.statistic((), where, scale))
    assert (0 <= s).all() and (s <= 1).all() and 0 <= at <= 1 + 1e-6
    if len(set(counts)) > 1 and settings.get("tau", 0) <= max(counts):
        head = s <= at + 1e-5 if scale == "rank" else s >= at - 1e-5
        np.testing.assert_array_equal(head, direction < 0)


# By variance.


def spread(logits, labels):
    h = softmax(logits) - np.eye(C)[labels]
    return np.array(
        [((h[labels == c] - h[labels == c].mean(0)) ** 2).sum(1).mean() if (labels == c).any() else np.nan for c in range(C)]
    )


@pytest.mark.parametrize("tau", ["mean", "median", 0.2])
def test_by_variance_of_the_logit_gradient_over_an_epoch(tau):
    batches = [draw(0), draw(1), draw(2)]
    split = pj.by_variance(tau=tau)
    np.testing.assert_array_equal(directions(split, *batches[:2], epochs=[0, 0]), 0)
    state = after(split, *batches, epochs=[0, 0, 1])
    variance = spread(*(np.concatenate(x) for x in zip(*batches[:2])))
    threshold = {"mean": np.nanmean(variance), "median": np.nanmedian(variance)}.get(tau, tau)
    np.testing.assert_array_equal(split.direction(state, context()), [*np.where(variance > threshold + 1e-6, -1, 1)[:3], 0])
    s, at = split.statistic(state, context(), "rank")
    top = np.nanmax(variance)
    np.testing.assert_allclose(s, np.nan_to_num(variance) / top, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(at, min(threshold / top, 1), rtol=1e-4)


def test_by_variance_over_steps():
    first, second = draw(0), draw(1)
    split = pj.by_variance(update="step", decay=0.6)
    h = [softmax(u) - np.eye(C)[y] for u, y in (first, second)]
    moment = lambda f: sum(
        w * np.array([f(x)[y == c].mean(0) for c in range(3)]) for w, x, (_, y) in zip((0.6, 0.4), h, (first, second))
    )
    variance = moment(lambda x: (x**2).sum(1)) - (moment(lambda x: x) ** 2).sum(1)
    s, _ = split.statistic(after(split, first, second), context(), "rank")
    np.testing.assert_allclose(s[:3], variance / variance.max(), rtol=1e-4)


# Per sample, and one for all.


def test_by_loss():
    np.testing.assert_array_equal(by_loss(jnp.array([0.1, 0.5, 0.7]), tau=0.5), [1, -1, -1])


@given(st.lists(st.integers(0, 5), min_size=8, max_size=8), st.integers(0, 8))
@settings(max_examples=50)
def test_by_loss_top_share(losses, number):
    order = sorted(range(8), key=lambda i: (-losses[i], i))
    expected = [-1 if i in order[:number] else 1 for i in range(8)]
    np.testing.assert_array_equal(by_loss_top(jnp.asarray(losses, jnp.float32), share=number / 8), expected)


def test_all_classes():
    split = pj.all_classes()
    np.testing.assert_array_equal(directions(split, draw()), 1)
    np.testing.assert_array_equal(directions(pj.all_classes(direction=-1.0)), -1)
    np.testing.assert_array_equal(directions(pj.all_classes(direction=np.array([1.0, -1.0, 0.0, 1.0]))), [1, -1, 0, 1])
    s, at = split.statistic((), context(), "rank")
    assert s.shape == (C,) and float(jnp.abs(s).max()) == at == 0


# Settings.


def test_as_split_takes_names_their_defaults_and_directions():
    same = lambda a, b: np.testing.assert_array_equal(directions(a, draw()), directions(b, draw()))
    same(as_split("f", "accuracy", tau=0.3), pj.by_accuracy(tau=0.3))
    same(as_split("f", "by_accuracy"), pj.by_accuracy())
    same(as_split("f", "accuracy", accuracy=dict(measure="top1", tau=0.2)), pj.by_accuracy(measure="top1", tau=0.2))
    same(as_split("f", "accuracy", tau=0.9, accuracy=dict(measure="top1", tau=0.2)), pj.by_accuracy(measure="top1", tau=0.9))
    same(as_split("f", "all"), pj.all_classes())
    same(as_split("f", "accuracy", direction=-1.0), pj.all_classes(direction=-1.0))
    made = pj.by_variance()
    assert as_split("f", made) is made
    assert as_split("f", "frequency").needs == ("class_counts",) and as_split("f", "variance").needs == ()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            dict(split="acuracy"),
            "lpl needs split .* got 'acuracy'. Did you mean 'accuracy'. There are: accuracy, all, frequency",
        ),
        (dict(split=pj.by_accuracy), r"got the function by_accuracy. Call it: split=by_accuracy\(\)"),
        (dict(split=3), "got 3. There are"),
        (dict(split=pj.by_accuracy(), tau=0.2), r"Write split=by_accuracy\(tau=0.2\)"),
        (dict(split="all", tau=0.2), "needs no tau with split='all', got 0.2"),
        (dict(split="accuracy", tau="average"), "by_accuracy needs tau .* got 'average'.*mean, median"),
        (dict(split="frequency", tau="mean"), "by_frequency needs tau .* got 'mean'"),
        (dict(split="frequency", tau=1.5), "by_frequency needs 0 <= tau <= 1, got 1.5"),
        (dict(split="accuracy", tau=-0.1), "by_accuracy needs tau >= 0, got -0.1"),
        (dict(split="all", direction=2.0), "all_classes needs -1 <= direction <= 1, got 2.0"),
    ],
)
def test_wrong_settings(settings, expected):
    with pytest.raises(ValueError, match=expected):
        as_split("lpl", **settings)


@pytest.mark.parametrize("factory", [pj.by_accuracy, pj.by_variance])
def test_wrong_ways_to_update(factory):
    with pytest.raises(ValueError, match="needs update .* got 'epochs'. Did you mean 'epoch'"):
        factory(update="epochs")
    with pytest.raises(ValueError, match="needs over .* got 'al'. Did you mean 'all'"):
        pj.by_accuracy(over="al")
    with pytest.raises(ValueError, match="needs 0 <= decay <= 1, got 1.2"):
        factory(decay=1.2)


def test_thresholds_may_be_traced():
    batch = draw()
    q = measured(*batch, "probability")
    found = jax.jit(lambda tau: pj.by_accuracy(tau=tau).direction(after(pj.by_accuracy(), batch), context()))
    for tau in (0.1, 0.5, 1.0):
        np.testing.assert_array_equal(found(tau), [*np.where(q <= tau, 1, -1)[:3], 0])
