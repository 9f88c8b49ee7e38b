"""What people should know of the test set before they read its numbers: classes that are missing, an imbalance."""

from collections.abc import Sequence

import numpy as np

from perturbjax.analysis import groups_by_frequency, is_balanced
from perturbjax.data import Dataset
from perturbjax.data.agreement import UNTESTED

NAMED = 10
"""Classes that a note names; of more it says how many."""


def notes_of(datasets: Sequence[Dataset]) -> list[str]:
    """All notes on the data of the seeds: the reader's, of the first seed's, and `notes_on_test_sets`.

    Of classes without a test sample both speak: it is left to the latter, which knows all seeds.
    """
    first = datasets[0]
    others = [note for note in first.notes if not note.startswith(f"{first.name}: {UNTESTED}")]
    return [*others, *notes_on_test_sets(datasets)]


def notes_on_test_sets(datasets: Sequence[Dataset]) -> list[str]:
    """Sentences about the test sets of the seeds: classes and groups without samples, and whether accuracy is the frequent classes'."""
    counts = [np.bincount(d.test_labels, minlength=d.num_classes) for d in datasets]
    names = [str(name) for name in datasets[0].class_names]
    notes = []
    for missing, where in by_seed([tuple(np.flatnonzero(found == 0).tolist()) for found in counts]):
        notes.append(
            f"{listed(missing, names)} {'has' if len(missing) == 1 else 'have'} no test sample{where}: nobody knows how well "
            f"{'it is' if len(missing) == 1 else 'they are'} classified. Balanced accuracy, macro F1 and the means of head, medium and tail "
            f"are over the {len(names) - len(missing)} classes that are tested."
        )
    for empty, where in by_seed([empty_groups(d, found) for d, found in zip(datasets, counts, strict=True)]):
        notes += [f"{name}: none of its classes has a test sample{where}, so it has no accuracy." for name in empty]
    uneven = [found for found in counts if not is_balanced(found)]
    if uneven:
        found = uneven[0]
        low, high = int(np.argmin(np.where(found > 0, found, found.max()))), int(np.argmax(found))
        notes.append(
            f"the test set is not balanced, from {found[high]} samples of class {names[high]!r} down to {found[low]} of {names[low]!r}, so "
            "accuracy is mostly that of the frequent classes. Balanced accuracy, the mean over the classes, counts each class the same."
        )
    return notes


def by_seed(found: Sequence[tuple]) -> list[tuple[tuple, str]]:
    """[(what isn't empty, "" or which seeds it is of)], each once."""
    kinds = [kind for kind in dict.fromkeys(found) if kind]
    if len(set(found)) == 1:
        return [(kind, "") for kind in kinds]
    of = lambda kind: ", ".join(str(seed) for seed, own in enumerate(found) if own == kind)
    return [(kind, f" under seed {of(kind)}") for kind in kinds]


def empty_groups(dataset: Dataset, counts: np.ndarray) -> tuple[str, ...]:
    """The groups by training frequency that have classes, but no accuracy."""
    groups = groups_by_frequency(dataset.class_counts)
    if groups is None:
        return ()
    members = groups._asdict()  # of two classes none is in the middle: no column, no note
    return tuple(name for name, own in members.items() if len(own) and not counts[own].any())


def listed(classes: Sequence[int], names: Sequence[str]) -> str:
    """class 'a'; classes 'a' and 'b'; the first ones of many, and their number."""
    quoted = [repr(names[c]) for c in classes[:NAMED]]
    if len(classes) == 1:
        return f"class {quoted[0]}"
    if len(classes) > NAMED:
        return f"{len(classes)} classes ({', '.join(quoted)}, …)"
    return f"classes {', '.join(quoted[:-1])} and {quoted[-1]}"
