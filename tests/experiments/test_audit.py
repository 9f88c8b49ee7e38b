"""experiments/audit.py: wrong labels are found with one training, better than by cleanlab with five."""

import csv
import json

import numpy as np
import pytest

from experiments import audit, train
from perturbjax.data import load

pytestmark = pytest.mark.optax_promotes  # schedules


@pytest.fixture(scope="module", params=["symmetric", "pair"])
def audited(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "audit"
    flags = ["--view", f"noise({request.param}, 0.2)", "--out", str(out)]
    audit.main(flags)
    return out, flags, json.loads((out / "audit.json").read_text())


def test_wrong_labels_are_found_with_one_training_better_than_by_cleanlab_with_five(audited):
    _, _, found = audited
    assert found["trainings"] == 1 and found["auroc"] > 0.97 and found["average_precision"] > 0.93
    assert found["f1_at_threshold"] > 0.75
    assert found["noise_rate"]["true"] == pytest.approx(0.2, abs=0.001)
    assert found["noise_rate"]["estimated"] == pytest.approx(0.2, abs=0.07)
    assert set(found["baselines"]) == {"cleanlab", "loss", "aum"} and set(found["signals"]) >= {"logpert", "gradient_norm"}
    pytest.importorskip("cleanlab")
    best = found["baselines"]["cleanlab"]
    assert best["trainings"] == 5 and best["auroc"] > 0.9
    assert found["auroc"] > best["auroc"] and found["average_precision"] > best["average_precision"]


def test_every_sample_is_listed_the_most_suspicious_first(audited):
    out, _, found = audited
    with open(out / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    digits = load("digits")
    assert sorted(int(row["index"]) for row in rows) == sorted(digits.train_index)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and sum(int(row["flagged"]) for row in rows) == found["flagged"]
    truth = dict(zip(digits.train_index.tolist(), digits.train_labels.tolist(), strict=True))
    assert all(int(row["true"]) == truth[int(row["index"])] for row in rows)
    right = [row["suggested"] == row["true"] for row in rows[:100] if row["given"] != row["true"]]
    assert np.mean(right) > 0.9


def test_the_sheet_shows_pictures_and_needs_nothing_else(audited):
    page = (audited[0] / "sheet.html").read_text()
    assert page.count("<img") == 200 and "data:image/png;base64," in page and "http" not in page


def test_the_cleaned_set_is_read_again_and_has_fewer_wrong_labels(audited):
    out, _, found = audited
    cleaned, digits = load(out / "cleaned.npz"), load("digits")
    assert len(cleaned.train_labels) == len(digits.train_labels) - found["flagged"]
    truth = dict(zip(digits.train_index.tolist(), digits.train_labels.tolist(), strict=True))
    left = np.mean([truth[i] != y for i, y in zip(cleaned.train_index.tolist(), cleaned.train_labels.tolist(), strict=True)])
    assert left < 0.1
    np.testing.assert_array_equal(cleaned.test_labels, digits.test_labels)


def test_the_same_command_trains_nothing_again(audited, monkeypatch):
    out, flags, found = audited
    monkeypatch.setattr(audit, "fit", None)  # a training would fail
    audit.main(flags)
    again = json.loads((out / "audit.json").read_text())
    changing = ("seconds", "cost")
    assert {k: v for k, v in again.items() if k not in changing} == {k: v for k, v in found.items() if k not in changing}


def test_clean_labels_are_left_alone_and_nothing_is_claimed(tmp_path):
    audit.main(["--out", str(tmp_path), "--epochs", "10"])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["auroc"] is None and found["noise_rate"]["true"] is None and found["baselines"]["cleanlab"] is None
    assert found["noise_rate"]["estimated"] < 0.02


def test_folds_seeds_and_relabelling(tmp_path):
    flags = ["--view", "noise(pair, 0.2)", "--evidence", "folds", "--folds", "2", "--seeds", "2", "--epochs", "8"]
    audit.main([*flags, "--clean", "relabel", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["trainings"] == 4 and "disagreement" in found["signals"] and found["auroc"] > 0.9
    relabelled, digits = load(tmp_path / "cleaned.npz"), load("digits")
    assert len(relabelled.train_labels) == len(digits.train_labels)
    assert np.mean(relabelled.train_labels != digits.train_labels) < 0.12
    train.main(["--data", str(tmp_path / "cleaned.npz"), "--view", "none", "--epochs", "1", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evidence", "memry"], "memory or folds"),
        (["--clean", "remove"], "drop or relabel"),
        (["--seeds", "0"], "at least 1"),
        (["--folds", "1"], "at least 2, or 0"),
        (["--weight", "1"], "0 < λ < 1"),
        (["--method", "ce, lpl"], "one method"),
        (["--view", "thin(3)", "--evidence", "folds"], "got 5 folds and a class of 3. Write --folds 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_end_with_a_clear_error(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        audit.main([*flags, "--batch-size", "16", "--out", str(tmp_path)])
