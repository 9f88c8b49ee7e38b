"""perturbjax.analysis.audit: scores, thresholds, and how good they are, against worked examples."""

import numpy as np
import pytest

from perturbjax.analysis import audit

LABELS = np.array([0, 0, 1, 1, 2])
PROBABILITY = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [np.nan] * 3])


def test_ranks_are_combined_and_unknown_samples_come_last():
    found = {"a": np.array([1.0, 30.0, 2.0, np.nan]), "b": np.array([-5.0, 7.0, -5.0, 1.0])}
    np.testing.assert_allclose(audit.combined(found), np.array([(1 + 1.5) / 2, 3, (2 + 1.5) / 2, 0]) / 3)


def test_suspects_are_those_whose_mean_prediction_is_another_class():
    np.testing.assert_array_equal(audit.suspects(PROBABILITY, LABELS), [False, True, False, True, False])
    np.testing.assert_array_equal(audit.suggested(PROBABILITY, LABELS)[:4], [1, 1, 0, 2])


def test_confusion_says_what_given_labels_really_are():
    flagged, suggestion = audit.suspects(PROBABILITY, LABELS), audit.suggested(PROBABILITY, LABELS)
    np.testing.assert_allclose(audit.confusion(LABELS, suggestion, flagged, 3), [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]])


def test_quality_of_a_perfect_a_reversed_and_a_worked_ranking():
    wrong = np.array([True, False, False, True])
    assert audit.quality(np.array([4.0, 1, 2, 3]), wrong) == {
        "auroc": 1.0,
        "average_precision": 1.0,
        "precision_at_k": 1.0,
        "k": 2,
    }
    assert audit.quality(np.array([1.0, 4, 3, 2]), wrong)["auroc"] == 0.0
    worked = audit.quality(np.array([4.0, 3, 1, 2]), wrong)  # the wrong ones at ranks 1 and 3
    assert worked["average_precision"] == pytest.approx((1 + 2 / 3) / 2) and worked["precision_at_k"] == 0.5
    assert audit.quality(np.ones(4), np.zeros(4, bool)) is None
    assert audit.threshold_quality(wrong, wrong) == 1.0 and audit.threshold_quality(wrong, np.zeros(4, bool)) is None


def test_cleanlab_scores_are_turned_round():
    pytest.importorskip("cleanlab")
    labels = np.array([0, 1, 1])
    scores = audit.cleanlab_scores(labels, np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]))
    for score in scores.values():
        assert score.argmax() == 1
