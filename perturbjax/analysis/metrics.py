r"""What a trained classifier gets right, from its test logits; the relative loss variation of a perturbation.

    accuracy = mean_i [argmax u_i = y_i],   balanced accuracy = mean_c R_c,   macro F1 = mean_c 2 P_c R_c / (P_c + R_c)
    P_c, R_c: precision and recall of class c;   ECE = Σ_b |B_b| / N · |accuracy(B_b) − confidence(B_b)|, 15 equal bins
    variation of class c = (l̄′_c − l̄_c) / l̄_c,    l̄_c and l̄′_c: mean loss of class c without and with the perturbation

All numpy on the host, computed in float64; accuracies and errors are fractions in 0..1 (percent is for tables).
A sample with a nan among its logits (a run that diverged) counts as wrong and as no class's prediction; its calibration is nan.
Means over classes are over the classes with test samples: what the others' accuracy would be, nobody knows.
Sources: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017 (ECE); Li, Su, Wu, Zhang,
"Logit Perturbation", AAAI 2022, Figure 1 (variation).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from perturbjax.label_form import trouble

BALANCED = 1.5
"""How many times the samples of the smallest class the largest one of a balanced test set may have."""


class Groups(NamedTuple):
    """Class indices by training frequency; the three together are all classes, each most frequent first."""

    head: np.ndarray  # the 30 % most frequent classes
    medium: np.ndarray  # the 40 % between; empty for two classes
    tail: np.ndarray  # the 30 % rarest


class ClassCounts(NamedTuple):
    """What accuracy, precision, recall and F1 of the classes follow from, [C] integers each."""

    hits: np.ndarray  # samples of the class that are predicted as it
    predicted: np.ndarray  # samples of any class that are predicted as it
    support: np.ndarray  # samples of the class

    @classmethod
    def of(cls, predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> "ClassCounts":
        """Of predicted classes [N] (-1: none) and labels [N]; the work is N + C, not C² as of a confusion matrix."""
        found, y = np.asarray(predictions), np.asarray(labels)
        count = lambda classes: np.bincount(classes, minlength=num_classes)
        return cls(count(y[found == y]), count(found[found >= 0]), count(y))

    @property
    def recall(self) -> np.ndarray:
        """[C], the accuracy on each class's samples; nan without any."""
        return _share(self.hits, self.support)

    @property
    def precision(self) -> np.ndarray:
        """[C], how much of what is predicted as a class is of it; nan where nothing is."""
        return _share(self.hits, self.predicted)

    @property
    def f1(self) -> np.ndarray:
        """[C], 2 P R / (P + R) as 2 hits / (predicted + support), which is 0 without hits; nan for a class without samples."""
        return np.where(self.support > 0, _share(2 * self.hits, self.predicted + self.support), np.nan)

    @property
    def accuracy(self) -> float:
        """Share of all samples."""
        return float(self.hits.sum() / self.support.sum())

    @property
    def balanced_accuracy(self) -> float:
        """The mean of `recall`."""
        return _mean(self.recall)

    @property
    def macro_f1(self) -> float:
        """The mean of `f1`."""
        return _mean(self.f1)

    def summary(self) -> dict[str, float]:
        """{"accuracy", "balanced_accuracy", "macro_f1"}."""
        return {name: getattr(self, name) for name in ("accuracy", "balanced_accuracy", "macro_f1")}


def accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples whose largest logit is the label's; equal logits: the first wins.

    logits (or probabilities): [N, C]. labels: [N] integers in 0..C-1.
    """
    return _counts("accuracy", logits, labels).accuracy


def balanced_accuracy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the classes' accuracies: each class counts the same, however many test samples it has.

    scikit-learn's `balanced_accuracy_score`; equal to `accuracy` where all classes have as many samples.

    >>> always_first = [[1.0, 0.0]] * 10
    >>> accuracy(always_first, [0] * 9 + [1]), balanced_accuracy(always_first, [0] * 9 + [1])
    (0.9, 0.5)
    """
    return _counts("balanced_accuracy", logits, labels).balanced_accuracy


def macro_f1(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the classes' F1, the harmonic mean of precision and recall (0 for a class that is never hit).

    scikit-learn's `f1_score(average="macro")`, over the classes with test samples (`labels=np.unique(labels)` there): otherwise a single
    wrong prediction of a class without any would change how many classes the mean is over.
    """
    return _counts("macro_f1", logits, labels).macro_f1


def confusion_matrix(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """[C, C] integers: how many samples of class i (row) are predicted as class j (column); scikit-learn's `confusion_matrix`."""
    u, y = _checked("confusion_matrix", logits, labels)
    matrix = np.zeros([u.shape[1]] * 2, np.int64)
    found = predictions(u)
    np.add.at(matrix, (y[found >= 0], found[found >= 0]), 1)
    return matrix


def predictions(logits: ArrayLike) -> np.ndarray:
    """[N], the class of the largest logit, of equal ones the first; -1 for a sample with a nan among its logits."""
    u = np.asarray(logits)
    return np.where(np.isnan(u).any(axis=1), -1, u.argmax(axis=1))


def is_balanced(class_counts: ArrayLike) -> bool:
    """Whether no class has more than one and a half times the samples of another; classes without any are left out.

    Accuracy then differs from balanced accuracy by about 10 points at most, far less as a rule.

    >>> is_balanced([36, 35, 37]), is_balanced([50, 10])
    (True, False)
    """
    counts = np.asarray(class_counts)
    counts = counts[counts > 0]
    return bool(counts.size == 0 or counts.max() <= BALANCED * counts.min())


def top_k_accuracy(logits: ArrayLike, labels: ArrayLike, *, k: int = 5) -> float:
    """Share of samples whose label is among the k largest logits (probabilities); equal ones: lower index first."""
    if k < 1:
        raise ValueError(f"top_k_accuracy needs k of at least 1, got {k}. Write top_k_accuracy(logits, labels, k=5).")
    u, y = _checked("top_k_accuracy", logits, labels)
    return float(_hits(u, y, k).mean())


def per_class_accuracy(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """[C], the accuracy on the test samples of each class (its recall); nan for a class without any."""
    return _counts("per_class_accuracy", logits, labels).recall


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, *, bins: int = 15, probabilities: bool = False) -> float:
    """How far confidence (the largest probability) and accuracy lie apart, in 0..1; 0 is calibrated.

    Args:
      logits: [N, C], or probabilities [N, C] with `probabilities=True`. labels: [N] integers in 0..C-1.
      bins: number of bins of equal width, (0, 1/bins], (1/bins, 2/bins], ...; empty ones count nothing.

    >>> float(round(expected_calibration_error([[0.8, 0.2], [0.8, 0.2]], [0, 1], probabilities=True), 3))
    0.3
    """
    u, y = _checked("expected_calibration_error", logits, labels)
    u, sums = u.astype(np.float64), u.sum(axis=1, dtype=np.float64)
    is_distribution = bool(np.all(u >= 0) and np.all(np.abs(sums - 1) < 1e-2))
    if probabilities and not is_distribution and not np.isnan(u).any():
        raise ValueError(
            f"expected_calibration_error needs rows ≥ 0 that sum to 1, got sums {sums.min():.4g}..{sums.max():.4g} and "
            f"a smallest entry of {u.min():.4g}. Leave probabilities=True out if they are logits."
        )
    if not probabilities and is_distribution and np.all(np.abs(sums - 1) < 1e-5):
        raise ValueError(
            f"expected_calibration_error needs logits, got {len(u)} rows that are ≥ 0 and sum to 1. "
            "Write probabilities=True if they are probabilities."
        )
    if not probabilities:
        with np.errstate(invalid="ignore"):  # inf − inf: nan, like any other row that is not finite
            u = np.exp(u - u.max(axis=1, keepdims=True))
        u = u / u.sum(axis=1, keepdims=True)
    confidence = u.max(axis=1)
    if np.isnan(confidence).any():
        return float("nan")
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=_hits(u, y, 1) - confidence, minlength=bins)  # |B_b| · (accuracy − confidence)
    return float(np.abs(gap).sum() / len(y))


def groups_by_frequency(class_counts: ArrayLike) -> Groups | None:
    """Head, medium and tail: the most frequent 30 %, the middle 40 % and the rarest 30 % of the classes.

    The 30 % are rounded, half up, to at least one class.

    Args:
      class_counts: [C] training samples of each class; equal counts are ordered by class index.
    Returns:
      `Groups`, or None if all counts are equal (balanced data have no tail).

    >>> [classes.tolist() for classes in groups_by_frequency([5, 50, 500])]
    [[2], [1], [0]]
    """
    counts = np.asarray(class_counts)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(
            f"groups_by_frequency needs class_counts [C], got shape {counts.shape}. Write np.bincount(labels, minlength=C)."
        )
    if np.all(counts == counts[0]):
        return None
    order, edge = np.argsort(-counts, kind="stable"), max(1, (3 * counts.size + 5) // 10)
    return Groups(order[:edge], order[edge:-edge], order[-edge:])


def group_accuracy(logits: ArrayLike, labels: ArrayLike, groups: Groups | None) -> dict[str, float | None]:
    """{"head", "medium", "tail"}: the mean of the accuracies of a group's classes, each class counting the same.

    Classes without test samples are left out, a group without any is nan; groups=None (balanced) gives three None.
    """
    return _group_means(per_class_accuracy(logits, labels), groups)


def relative_loss_variation(
    clean_losses: ArrayLike, perturbed_losses: ArrayLike, labels: ArrayLike, num_classes: int
) -> np.ndarray:
    """[C], by how much a perturbation changes the loss of each class: −0.2 is a fifth less, +1 twice the loss.

    LPL's Figure 1. It is the variation of the class means, (l̄′_c − l̄_c) / l̄_c, not the mean of the samples' own
    variations, which a few well fitted samples with l ≈ 0 would decide. nan for a class without samples or loss.

    Args:
      clean_losses, perturbed_losses: l and l′ [N], of the same samples. labels: [N] integers in 0..num_classes-1.
    """
    clean, perturbed, y = (np.asarray(x) for x in (clean_losses, perturbed_losses, labels))
    if clean.ndim != 1 or not clean.shape == perturbed.shape == y.shape:
        raise ValueError(
            f"relative_loss_variation needs two losses [N] and labels [N], got {clean.shape}, {perturbed.shape} and "
            f"{y.shape}. Take the losses before any mean: relative_loss_variation(losses, perturbed, labels, C)."
        )
    _check_labels("relative_loss_variation", y, num_classes)
    before, after = (_class_means(x.astype(np.float64), y, num_classes) for x in (clean, perturbed))
    with np.errstate(all="ignore"):
        return np.where(before > 0, (after - before) / before, np.nan)


def evaluate(logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, *, probabilities: bool = False) -> dict:
    """All of the above for one trained model, as plain Python numbers for results.json; what is undefined is None.

    Args:
      logits: [N, C], or probabilities with `probabilities=True`. labels: [N] integers in 0..C-1.
      class_counts: [C], samples of each class in the *training* data.
    Returns:
      {"accuracy", "balanced_accuracy", "macro_f1", "top5" (None up to 10 classes), "ece", "head", "medium", "tail" (None if balanced)},
      of each class "per_class" (accuracy, which is recall), "precision", "f1" and "support" (test samples), and "confusion", of the
      confusion matrix what is not zero: {"true", "predicted", "count"}, lists of one length.
    """
    u, y = _checked("evaluate", logits, labels)
    if np.shape(class_counts) != u.shape[1:]:
        raise ValueError(
            f"evaluate needs class_counts [{u.shape[1]}], one for each logit, got shape {np.shape(class_counts)}. "
            f"Write evaluate(logits, labels, np.bincount(train_labels, minlength={u.shape[1]}))."
        )
    number = lambda x: None if x is None or np.isnan(x) else float(x)
    found = scores(predictions(u), y, u.shape[1])
    groups = _group_means(np.array(found["per_class"], np.float64), groups_by_frequency(class_counts))
    return found | {
        "top5": number(top_k_accuracy(u, y, k=5)) if u.shape[1] > 10 else None,
        "ece": number(expected_calibration_error(u, y, probabilities=probabilities)),
        **{name: number(value) for name, value in groups.items()},
    }


def scores(predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> dict:
    """What `evaluate` reports of predicted classes [N] (-1: none) alone, without logits: all but "top5", "ece" and the groups."""
    counts = ClassCounts.of(predictions, labels, num_classes)
    plain = lambda values: [None if np.isnan(x) else float(x) for x in values]
    return counts.summary() | {
        "per_class": plain(counts.recall),
        "precision": plain(counts.precision),
        "f1": plain(counts.f1),
        "support": counts.support.tolist(),
        "confusion": confusions(predictions, labels),
    }


def confusions(predictions: ArrayLike, labels: ArrayLike) -> dict[str, list[int]]:
    """{"true", "predicted", "count"}: the entries of the confusion matrix that are not zero, by row; never more than samples.

    `scipy.sparse.coo_array((count, (true, predicted)), shape=(C, C))` is the matrix.

    >>> confusions([0, 0, 2], [0, 0, 1])
    {'true': [0, 1], 'predicted': [0, 2], 'count': [2, 1]}
    """
    found, y = np.asarray(predictions), np.asarray(labels)
    return _summed(y[found >= 0], found[found >= 0], 1)


def add_confusions(parts: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The sum of confusion matrices in the form of `confusions`, such as those of several seeds.

    >>> add_confusions([confusions([0], [0]), confusions([0, 1], [0, 0])])
    {'true': [0, 0], 'predicted': [0, 1], 'count': [2, 1]}
    """
    return _summed(
        *(np.concatenate([np.array(part[key], np.int64) for part in parts]) for key in ("true", "predicted", "count"))
    )


def _summed(true, predicted, count):
    """One entry for each pair (true, predicted) that occurs."""
    (rows, columns), place = np.unique(np.stack([true, predicted]), axis=1, return_inverse=True)
    total = np.zeros(rows.size, np.int64)
    np.add.at(total, place.reshape(-1), count)
    return {"true": rows.tolist(), "predicted": columns.tolist(), "count": total.tolist()}


def _checked(function, logits, labels):
    """logits [N, C] and labels [N] as arrays, N and C at least 1, labels in range."""
    u, y = np.asarray(logits), np.asarray(labels)
    if u.ndim != 2 or u.size == 0 or y.shape != u.shape[:1]:
        raise ValueError(
            f"{function} needs logits [N, C] and labels [N] with at least one sample, got {u.shape} and {y.shape}. "
            "Flatten further axes into the first one: logits.reshape(-1, C), labels.reshape(-1)."
        )
    _check_labels(function, y, u.shape[1])
    return u, y


def _check_labels(function, labels, num_classes):
    if not np.issubdtype(labels.dtype, np.integer):
        got, fix = trouble(labels)
        raise TypeError(f"{function} needs integer labels, got {got.removeprefix('dtype ')}. {fix}")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"{function} needs labels in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}. "
            "Number them first: np.unique(labels, return_inverse=True)[1]."
        )


def _hits(u, y, k):
    """[N] bool, whether fewer than k classes come before the label's; equal logits: lower index first; nan: False."""
    true = np.take_along_axis(u, y[:, None], axis=1)
    before = (u > true) | ((u == true) & (np.arange(u.shape[1]) < y[:, None]))
    return (before.sum(axis=1) < k) & ~np.isnan(u).any(axis=1)


def _counts(function, logits, labels):
    u, y = _checked(function, logits, labels)
    return ClassCounts.of(predictions(u), y, u.shape[1])


def _group_means(per_class, groups):
    return dict.fromkeys(Groups._fields) if groups is None else {k: _mean(per_class[v]) for k, v in groups._asdict().items()}


def _share(part, whole):
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _class_means(values, labels, num_classes):
    count = np.bincount(labels, minlength=num_classes)
    return np.where(count > 0, np.bincount(labels, weights=values, minlength=num_classes) / np.maximum(count, 1), np.nan)


def _mean(values):
    """Mean of the entries that are not nan, nan if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
