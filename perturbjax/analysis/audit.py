"""Which labels are probably wrong: signals of single samples, their combination, a threshold, and how good the ranking is.

All signals are oriented alike: the larger, the more suspicious. Ranks are combined rather than values, since the signals' scales have
nothing in common.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score


def signals(dynamics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{signal: [N]}, the larger the more suspicious, of what `mean_dynamics` returns.

    Accumulated ‖v‖₁ of LogPert, loss and gradient norm, and minus the mean margin (aum).
    """
    return {
        "logpert": dynamics["logpert"],
        "loss": dynamics["loss"],
        "aum": -dynamics["margin"],
        "gradient_norm": dynamics["gradient_norm"],
    }


def combined(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] in (0, 1]: the mean over the signals of each sample's rank, ties sharing theirs. Samples without a signal (nan) get 0."""
    from scipy.stats import rankdata

    values = np.stack(list(found.values()))
    known = np.isfinite(values).all(0)
    score = np.zeros(values.shape[1])
    if known.any():
        score[known] = rankdata(values[:, known], axis=1).mean(0) / known.sum()
    return score


def suspects(probability: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] bool: whether the mean prediction over training, probability [N, C], has another class than the given label [N] on top.

    A threshold without a setting: on clean data it flags nothing that is learnt at once. Samples without a prediction (nan) pass.
    """
    known = np.isfinite(probability).all(1)
    return known & (np.where(known[:, None], probability, 0).argmax(1) != labels)


def suggested(probability: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] int: the most probable class that is not the given label."""
    others = np.nan_to_num(probability, nan=0.0).copy()
    others[np.arange(len(labels)), labels] = -1
    return others.argmax(1)


def confusion(labels: np.ndarray, suggestion: np.ndarray, flagged: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, C]: the estimated share of the samples with given label i (row) that belong to class j (column); rows sum to 1."""
    estimate = np.where(flagged, suggestion, labels)
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, estimate), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def quality(score: np.ndarray, wrong: np.ndarray) -> dict[str, Any] | None:
    """{"auroc", "average_precision", "precision_at_k", "k"} of a score [N] against known wrong labels [N] bool; k: how many are wrong.

    None unless there are both wrong and right labels.
    """
    k = int(wrong.sum())
    if k in (0, len(wrong)):
        return None
    top = np.argsort(-score, kind="stable")[:k]
    return {
        "auroc": float(roc_auc_score(wrong, score)),
        "average_precision": float(average_precision_score(wrong, score)),
        "precision_at_k": float(wrong[top].mean()),
        "k": k,
    }


def threshold_quality(flagged: np.ndarray, wrong: np.ndarray) -> float | None:
    """F1 of the flagged samples against known wrong labels; None where nothing is known to be wrong."""
    return float(f1_score(wrong, flagged)) if wrong.any() else None


def cleanlab_scores(labels: np.ndarray, probability: np.ndarray) -> dict[str, np.ndarray]:
    """{method: [N]}, cleanlab's label quality turned round (the larger, the more suspicious), from out-of-fold probabilities [N, C].

    Raises ImportError without cleanlab (pip install cleanlab).
    """
    from cleanlab.rank import get_label_quality_scores

    methods = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
    return {m: -get_label_quality_scores(labels, probability, method=m) for m in methods}
