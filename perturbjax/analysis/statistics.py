r"""Numbers over seeds: mean and standard deviation, and the paired comparison of two methods.

    d_s = a_s − b_s for each seed s,   mean(d) ± t_{0.975, n−1} · std(d) / √n        (std with n − 1 in the denominator)

Both methods see the same data subset and the same initialisation under a seed, so what a seed makes easier for both
drops out of d. Source: Student's paired t interval, any textbook; scipy.stats.ttest_rel gives the same numbers.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit  # the quantile of Student's t without the second that importing scipy.stats takes


def summary(values: Sequence[float | None]) -> dict:
    """{"mean", "std", "values"} of one number per seed, as plain Python numbers.

    std is the sample standard deviation (n − 1). With one value it is 0.0, which says nothing about the spread: tables
    leave it out. A missing value (None or nan: a seed that diverged) makes both None: a mean of the rest would flatter.

    >>> summary([0.5, 0.75])["mean"], summary([0.5])["std"], summary([0.5, None])["mean"]
    (0.625, 0.0, None)
    """
    x = _seeds("summary", values)
    listed = [None if np.isnan(v) else float(v) for v in x]
    if np.isnan(x).any():
        return {"mean": None, "std": None, "values": listed}
    return {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if x.size > 1 else 0.0, "values": listed}


def paired_difference(a: Sequence[float | None], b: Sequence[float | None]) -> dict:
    """{"mean", "low", "high", "n"}: the mean of a − b over seeds, its 95 % t interval. Method first, reference second.

    One seed gives a mean and no interval (low and high None); a missing value gives None for all three.

    >>> paired_difference([0.75, 0.5], [0.5, 0.25])
    {'mean': 0.25, 'low': 0.25, 'high': 0.25, 'n': 2}
    """
    x, y = _seeds("paired_difference", a), _seeds("paired_difference", b)
    if x.shape != y.shape:
        raise ValueError(
            f"paired_difference needs one value per seed from both methods, got {x.size} and {y.size}. "
            "Run both with the same seeds, in the same order: paired_difference(method_values, reference_values)."
        )
    d, n = x - y, x.size
    if np.isnan(d).any():
        return {"mean": None, "low": None, "high": None, "n": n}
    if n == 1:
        return {"mean": float(d[0]), "low": None, "high": None, "n": 1}
    half = stdtrit(n - 1, 0.975) * d.std(ddof=1) / np.sqrt(n)
    return {"mean": float(d.mean()), "low": float(d.mean() - half), "high": float(d.mean() + half), "n": n}


def mean_by_class(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """[C] from one row of C per seed (accuracies, loss variations): mean over the seeds with the class, or None."""
    x = np.asarray(rows, dtype=np.float64)  # None becomes nan
    if x.ndim != 2:
        raise ValueError(
            f"mean_by_class needs one row of C numbers per seed, got shape {x.shape}. "
            "Write mean_by_class([row]) for a single seed."
        )
    return [float(c[~np.isnan(c)].mean()) if not np.isnan(c).all() else None for c in x.T]


def _seeds(function, values):
    x = np.asarray(values, dtype=np.float64)  # None becomes nan
    if x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"{function} needs a list of numbers, one per seed, got shape {x.shape}. "
            "Write [0.91, 0.93, 0.92] for three seeds, [0.91] for one."
        )
    return x
