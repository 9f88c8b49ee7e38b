"""What came out of training: metrics of logits, statistics over seeds, the report. Knows no method, no trainer."""

from perturbjax.analysis.metrics import (
    ClassCounts,
    Groups,
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    evaluate,
    expected_calibration_error,
    group_accuracy,
    groups_by_frequency,
    is_balanced,
    macro_f1,
    per_class_accuracy,
    predictions,
    relative_loss_variation,
    top_k_accuracy,
)
from perturbjax.analysis.report import load_results, markdown, print_table, save_results, table, write_markdown, write_report
from perturbjax.analysis.statistics import mean_by_class, paired_difference, summary

__all__ = [
    "ClassCounts",
    "Groups",
    "accuracy",
    "balanced_accuracy",
    "confusion_matrix",
    "evaluate",
    "expected_calibration_error",
    "group_accuracy",
    "groups_by_frequency",
    "is_balanced",
    "load_results",
    "macro_f1",
    "markdown",
    "mean_by_class",
    "paired_difference",
    "per_class_accuracy",
    "predictions",
    "print_table",
    "relative_loss_variation",
    "save_results",
    "summary",
    "table",
    "top_k_accuracy",
    "write_markdown",
    "write_report",
]
