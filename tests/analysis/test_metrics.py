"""perturbjax.analysis.metrics against scikit-learn, a slow loop, and cases that can be worked out by hand."""

import json

import numpy as np
import pytest
from scipy.sparse import coo_array
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from perturbjax import analysis as pa
from perturbjax.analysis import metrics

N, C = 400, 7


@pytest.fixture(params=range(3))
def scored(request):
    """Logits that are right about half of the time and too confident; class 6 has no test samples."""
    rng = np.random.default_rng(request.param)
    y = rng.integers(0, C - 1, N)
    return (3 * (rng.normal(size=[N, C]) + 1.5 * np.eye(C)[y])).astype(np.float32), y


def softmax(u):
    e = np.exp(np.float64(u) - np.max(u, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_accuracies_are_those_of_scikit_learn(scored):
    u, y = scored
    assert pa.accuracy(u, y) == sk.accuracy_score(y, u.argmax(1))
    for k in (1, 2, 5):
        assert pa.top_k_accuracy(u, y, k=k) == sk.top_k_accuracy_score(y, u, k=k, labels=range(C))
    recall = sk.recall_score(y, u.argmax(1), labels=range(C - 1), average=None)
    np.testing.assert_allclose(pa.per_class_accuracy(u, y), [*recall, np.nan], rtol=1e-12)


def test_equal_logits_count_as_argmax_does():
    u = np.zeros([4, 3])
    assert pa.accuracy(u, np.array([0, 1, 2, 0])) == 0.5  # argmax takes the first
    assert pa.top_k_accuracy(u, np.array([0, 1, 2, 0]), k=2) == 0.75
    assert pa.top_k_accuracy(u, np.array([0, 1, 2, 0]), k=5) == 1.0


def test_calibration_error_is_that_of_scikit_learns_reliability_diagram(scored):
    u, y = scored
    p = softmax(u)
    correct, confidence = p.argmax(1) == y, p.max(1)
    share_right, mean_confidence = calibration_curve(correct, confidence, n_bins=15)
    size = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = (size[size > 0] / N * np.abs(share_right - mean_confidence)).sum()
    np.testing.assert_allclose(pa.expected_calibration_error(u, y), expected, rtol=1e-9)
    np.testing.assert_allclose(pa.expected_calibration_error(p, y, probabilities=True), expected, rtol=1e-9)


def test_calibration_error_by_hand():
    sure = np.array([[0.9, 0.1]] * 10)
    assert pa.expected_calibration_error(sure, [0] * 9 + [1], probabilities=True) == pytest.approx(0)  # right nine times
    assert pa.expected_calibration_error(sure, [0] * 10, probabilities=True) == pytest.approx(0.1)
    assert pa.expected_calibration_error(1e4 * np.eye(2), [1, 0]) == 1.0  # certain and wrong, without overflow


def test_probabilities_and_logits_are_not_mistaken_for_each_other(scored):
    u, y = scored
    with pytest.raises(ValueError, match="got 400 rows that are ≥ 0 and sum to 1"):
        pa.expected_calibration_error(softmax(u), y)
    with pytest.raises(ValueError, match="Leave probabilities=True out"):
        pa.evaluate(u, y, np.ones(C), probabilities=True)


def test_groups_are_thirty_forty_thirty_by_count():
    groups = pa.groups_by_frequency([5, 500, 5, 40, 30, 20, 10, 300, 200, 7])
    assert [g.tolist() for g in groups] == [[1, 7, 8], [3, 4, 5, 6], [9, 0, 2]]  # 5 and 5: by class index
    assert pa.groups_by_frequency([3, 3, 3]) is None
    for n in range(2, 40):
        head, medium, tail = pa.groups_by_frequency(np.arange(n))
        assert len(head) == len(tail) >= 1 and abs(len(head) - 0.3 * n) <= 0.5
        assert sorted([*head, *medium, *tail]) == list(range(n))


def test_group_accuracy_is_the_mean_of_its_classes(scored):
    u, y = scored
    groups = pa.groups_by_frequency([1, 2, 3, 4, 5, 6, 7])
    per_class, by_group = pa.per_class_accuracy(u, y), pa.group_accuracy(u, y, groups)
    assert groups.head.tolist() == [6, 5]
    assert by_group["head"] == per_class[5]  # class 6 has no test samples
    assert by_group["tail"] == pytest.approx((per_class[0] + per_class[1]) / 2)
    assert pa.group_accuracy(u, y, None) == {"head": None, "medium": None, "tail": None}


def test_loss_variation_is_the_variation_of_the_class_means():
    rng = np.random.default_rng(0)
    y, loss = rng.integers(0, 4, 60), rng.exponential(size=60)
    factor = np.array([0.5, 1.0, 1.25, 3.0])
    np.testing.assert_allclose(pa.relative_loss_variation(loss, factor[y] * loss, y, 5), [-0.5, 0, 0.25, 2, np.nan])
    other = loss + rng.normal(size=60)
    expected = [(other[y == c].mean() - loss[y == c].mean()) / loss[y == c].mean() for c in range(4)]
    np.testing.assert_allclose(pa.relative_loss_variation(loss, other, y, 4), expected)
    # One sample without loss must not decide; a class without loss has no relative variation.
    np.testing.assert_allclose(pa.relative_loss_variation([1e-9, 2, 0], [1, 2, 1], [0, 0, 1], 2), [0.5, np.nan])


def test_evaluate_collects_them_as_json(scored):
    u, y = scored
    out = pa.evaluate(u, y, np.arange(C))
    assert out == json.loads(json.dumps(out, allow_nan=False))
    assert out["accuracy"] == pa.accuracy(u, y) and out["ece"] == pa.expected_calibration_error(u, y)
    assert out["top5"] is None and out["per_class"][6] is None and out["tail"] is not None
    assert pa.evaluate(u, y, np.full(C, 9))["tail"] is None
    more = np.pad(u, ((0, 0), (0, 5)), constant_values=-np.inf)  # classes that are ruled out
    assert pa.evaluate(more, y, np.arange(12))["top5"] == pa.top_k_accuracy(u, y)
    p = softmax(u)
    assert pa.evaluate(p, y, np.arange(C), probabilities=True)["ece"] == pytest.approx(out["ece"])


def test_a_diverged_run_counts_as_wrong():
    out = pa.evaluate(np.full([6, 3], np.nan), np.zeros(6, int), [3, 2, 1])
    assert (out["accuracy"], out["ece"], out["per_class"]) == (0.0, None, [0.0, None, None])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], ValueError, r"got \(3, 4\) and \(2,\)"),
        ([0, 1, 4], ValueError, r"labels in 0..3, got 0..4"),
        ([0.0, 1.0, 2.0], TypeError, "integer labels, got float64"),
    ],
)
def test_errors_say_what_was_given(labels, error, message):
    with pytest.raises(error, match=message):
        pa.accuracy(np.zeros([3, 4]), labels)


def test_class_counts_belong_to_the_logits():
    with pytest.raises(ValueError, match=r"class_counts \[4\], one for each logit, got shape \(3,\)"):
        pa.evaluate(np.zeros([3, 4]), [0, 1, 2], [1, 2, 3])


@pytest.fixture(params=range(3))
def imbalanced(request):
    """Logits that favour frequent classes; every class has test samples, from about 300 to 1."""
    rng = np.random.default_rng(request.param)
    y = np.repeat(np.arange(C), [300, 120, 60, 30, 10, 3, 1])
    return (rng.normal(size=[len(y), C]) + 2 * np.eye(C)[y] - 0.5 * np.arange(C)).astype(np.float32), y


def test_balanced_accuracy_and_macro_f1_are_those_of_scikit_learn(imbalanced):
    u, y = imbalanced
    found = u.argmax(1)
    assert pa.balanced_accuracy(u, y) == pytest.approx(sk.balanced_accuracy_score(y, found), rel=1e-12)
    assert pa.macro_f1(u, y) == pytest.approx(sk.f1_score(y, found, average="macro"), rel=1e-12)
    assert pa.accuracy(u, y) - pa.balanced_accuracy(u, y) > 0.1  # the head's accuracy is not the classes'
    out = pa.evaluate(u, y, np.arange(C))
    assert (out["balanced_accuracy"], out["macro_f1"]) == (pa.balanced_accuracy(u, y), pa.macro_f1(u, y))
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, found, zero_division=np.nan)
    number = lambda values: np.array(values, np.float64)  # None becomes nan
    np.testing.assert_allclose(number(out["precision"]), precision)
    np.testing.assert_allclose(number(out["per_class"]), recall)
    np.testing.assert_allclose(number(out["f1"]), np.where(np.isnan(precision), 0, f1))
    assert out["support"] == support.tolist()


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_means_over_classes_are_over_those_with_test_samples(scored):
    u, y = scored  # class 6 has none, and is predicted now and then
    found = u.argmax(1)
    assert (found == 6).any() and not (y == 6).any()
    assert pa.balanced_accuracy(u, y) == pytest.approx(sk.balanced_accuracy_score(y, found), rel=1e-12)
    assert pa.macro_f1(u, y) == pytest.approx(sk.f1_score(y, found, average="macro", labels=np.unique(y)), rel=1e-12)
    out = pa.evaluate(u, y, np.arange(C))
    assert (out["per_class"][6], out["f1"][6], out["precision"][6], out["support"][6]) == (None, None, 0.0, 0)


def test_a_class_that_is_never_predicted_has_no_precision_but_counts_in_macro_f1():
    out = pa.evaluate(np.array([[2.0, 0.0]] * 4), [0, 0, 0, 1], [3, 1])
    assert out["precision"] == [0.75, None] and out["f1"] == [pytest.approx(6 / 7), 0.0]
    assert out["macro_f1"] == pytest.approx(3 / 7) and out["balanced_accuracy"] == 0.5 and out["accuracy"] == 0.75


def test_the_confusion_matrix_is_scikit_learns_whole_and_as_entries(scored):
    u, y = scored
    expected = sk.confusion_matrix(y, u.argmax(1), labels=range(C))
    np.testing.assert_array_equal(pa.confusion_matrix(u, y), expected)
    parts = [metrics.confusions(u[rows].argmax(1), y[rows]) for rows in (slice(0, 150), slice(150, None))]
    for entries in (pa.evaluate(u, y, np.arange(C))["confusion"], metrics.add_confusions(parts)):
        matrix = coo_array((entries["count"], (entries["true"], entries["predicted"])), shape=(C, C))
        np.testing.assert_array_equal(matrix.toarray(), expected)
        assert min(entries["count"]) > 0 and len(entries["count"]) == np.count_nonzero(expected)


def test_many_classes_cost_no_square_of_them():
    """A matrix of 10^6 classes would be 8 TB."""
    rng = np.random.default_rng(0)
    y, found = rng.integers(0, 10**6, 500), rng.integers(0, 10**6, 500)
    found[:200] = y[:200]
    counts = pa.ClassCounts.of(found, y, 10**6)
    assert counts.balanced_accuracy == pytest.approx(sk.recall_score(y, found, average="macro", labels=np.unique(y)))
    assert sum(metrics.confusions(found, y)["count"]) == 500


def test_a_sample_without_a_prediction_is_wrong_and_in_no_column():
    u = np.array([[1.0, 0.0, 0.0], [np.nan, 0.0, 1.0], [0.0, 1.0, 0.0]])
    y = np.array([0, 0, 1])  # argmax of the second row is 0, which would be right
    assert pa.predictions(u).tolist() == [0, -1, 1]
    out = pa.evaluate(u, y, [2, 1, 1])
    assert out["per_class"] == [0.5, 1.0, None] and out["balanced_accuracy"] == 0.75 and out["support"] == [2, 1, 0]
    assert out["confusion"] == {"true": [0, 1], "predicted": [0, 1], "count": [1, 1]} and pa.confusion_matrix(u, y).sum() == 2


def test_balanced_is_up_to_one_and_a_half_times_the_smallest_class():
    assert pa.is_balanced([10, 15, 12]) and not pa.is_balanced([10, 16, 12])
    assert pa.is_balanced([0, 5, 5]) and not pa.is_balanced([0, 5, 50])  # those that exist; the missing one is named elsewhere
