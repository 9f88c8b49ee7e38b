"""perturbjax.loss.balanced_fine_tuning: plain before, in expectation class-balanced sampling afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import C, cross_entropy, linear, onehot, run

COUNTS = np.array([10, 2, 5, 1])


@pytest.fixture
def problem():
    with linear() as found:
        yield found


@pytest.mark.parametrize("progress", [0.0, 0.79, 0.8, 0.99])
def test_the_weights_act_in_the_last_part(problem, progress):
    w, x, y = problem
    settings = dict(class_counts=COUNTS)
    out, grad = run(w, x, y, pj.balanced_fine_tuning(start=0.8), settings=settings, options=dict(progress=progress))
    factor = np.where(progress >= 0.8, 18 / (C * COUNTS[y]), 1.0)
    np.testing.assert_allclose(out.losses, factor * cross_entropy(x @ w, onehot(y)), rtol=1e-7)
    _, weighted = run(w, x, y, (), weights=jnp.asarray(factor))
    np.testing.assert_allclose(grad, weighted, atol=1e-8)


def test_their_mean_over_the_data_is_the_loss_of_class_balanced_samples():
    """A class drawn uniformly, then a sample of it: the mean over classes of the class's mean."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(C), COUNTS)
    u = rng.normal(size=(18, C)).astype(np.float32)
    made = pj.objective(lambda w, x: x, pj.balanced_fine_tuning(start=0.0), num_classes=C, class_counts=COUNTS)
    loss, _ = made({}, made.init({}, u), pj.batch(u, labels))
    losses = cross_entropy(u.astype(float), onehot(labels))
    np.testing.assert_allclose(loss, np.mean([losses[labels == c].mean() for c in range(C)]), rtol=1e-5)


def test_at_the_end_it_is_balanced_class_weighting(problem):
    w, x, y = problem
    late = dict(settings=dict(class_counts=COUNTS), options=dict(progress=0.95))
    ours, theirs = (run(w, x, y, links, **late)[0].losses for links in (pj.balanced_fine_tuning(), pj.class_weighting()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-7)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="balanced_fine_tuning needs 0 <= start <= 1, got 2"):
        pj.balanced_fine_tuning(start=2.0)
    with pytest.raises(ValueError, match="balanced_fine_tuning needs 'class_counts', got none"):
        pj.objective(lambda w, x: x @ w, pj.balanced_fine_tuning(), num_classes=C)
    made = pj.objective(lambda w, x: x @ w, pj.balanced_fine_tuning(), num_classes=C, class_counts=np.array([3, 0, 2, 1]))
    with pytest.raises(ValueError, match="got none of class 1"):
        made.init(jnp.ones([5, C]), jnp.ones([2, 5]))


def test_class_balanced_batches_need_no_weights_but_somebody_who_draws_them(problem):
    w, x, y = problem
    late = dict(progress=0.95)
    link = pj.balanced_fine_tuning(form="samples", start=0.8)
    drawn = dict(class_counts=COUNTS, balanced_from=0.8)
    out, grad = run(w, x, y, link, settings=drawn, options=late)
    plain, expected = run(w, x, y, ())
    np.testing.assert_array_equal(out.losses, plain.losses)
    np.testing.assert_array_equal(grad, expected)
    for settings, got in ((dict(), "none"), (dict(balanced_from=0.5), "them after 0.5")):
        with pytest.raises(
            ValueError, match=f"balanced_fine_tuning needs class-balanced batches .* 0.8 of training, got {got}"
        ):
            run(w, x, y, link, settings=dict(class_counts=COUNTS) | settings)
    with pytest.raises(ValueError, match="balanced_fine_tuning needs form to be one of its names, got 'draws'"):
        pj.balanced_fine_tuning(form="draws")
    with pytest.raises(ValueError, match="balanced_fine_tuning needs rate >= 0, got -1"):
        pj.balanced_fine_tuning(form="samples", rate=-1.0)
