"""Which number a comparison's methods are judged by, and the order that follows. Of results as `report` describes them."""

import numpy as np


def headline(results: dict) -> str:
    """What the methods are judged by: "accuracy", or "balanced_accuracy" where the test set is not balanced.

    Results that don't tell ("test_balanced" of the data; those of earlier versions) are judged by accuracy.
    """
    scored = all(m.get("balanced_accuracy") for m in results["methods"].values())
    return "balanced_accuracy" if (results.get("data") or {}).get("test_balanced") is False and scored else "accuracy"


def ordered(results: dict) -> list[str]:
    """The methods in the order of the tables: as they are in the results, or by balanced accuracy where that is the headline."""
    methods, key = results["methods"], headline(results)
    if key == "accuracy":
        return list(methods)
    mean = lambda name: methods[name][key]["mean"]
    return sorted(methods, key=lambda name: -np.inf if mean(name) is None else mean(name), reverse=True)  # of equals, the first


def difference_of(results: dict, name: str) -> dict | None:
    """A method's difference to the first one: in the headline."""
    return results["methods"][name].get("difference" if headline(results) == "accuracy" else "balanced_difference")


def num_untested(results: dict) -> int:
    """Classes without a test sample under any seed; 0 where the results don't tell."""
    return sum(n == 0 for n in next((m["support"] for m in results["methods"].values() if m.get("support")), ()))
