"""experiments/audit.py: wrong labels are found with one training, better than by cleanlab with five."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from experiments import audit, train
from perturbjax.data import Dataset, check, load
from perturbjax.data.text import build_words

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


def test_another_cleaning_sheet_or_number_of_folds_trains_nothing_again(tmp_path, monkeypatch):
    flags = ["--view", "thin(20)+noise(pair, 0.2)", "--epochs", "1", "--batch-size", "20", "--out", str(tmp_path)]
    audit.main([*flags, "--folds", "2"])
    with monkeypatch.context() as patched:
        patched.setattr(audit, "fit", None)
        audit.main([*flags, "--clean", "relabel", "--top", "7", "--folds", "0"])
        assert (tmp_path / "sheet.html").read_text().count("<img") == 7
        assert len(load(tmp_path / "cleaned.npz").train_labels) == 200
        with pytest.raises(ValueError, match="epochs: 1 there, 2 now"):  # what makes the training is still the folder's own
            audit.main([*flags, "--epochs", "2"])
    folds = ["--evidence", "folds", "--out", str(tmp_path / "folds")]
    audit.main([*flags, *folds, "--folds", "2"])
    with pytest.raises(ValueError, match="folds: 2 there, 3 now"):
        audit.main([*flags, *folds, "--folds", "3"])


def test_a_training_whose_record_is_damaged_is_read_from_its_checkpoint_or_done_again(tmp_path, capsys):
    flags = ["--view", "thin(20)", "--epochs", "1", "--batch-size", "20", "--out", str(tmp_path)]
    audit.main(flags)
    scores = (tmp_path / "audit.csv").read_text()
    (tmp_path / "seed-0" / "finished.npz").write_bytes(b"no archive")
    audit.main(flags)
    assert (tmp_path / "audit.csv").read_text() == scores and "is damaged: put aside" in capsys.readouterr().err
    for file in (tmp_path / "seed-0" / "checkpoints").rglob("d/*"):
        file.write_bytes(b"cut")
    audit.main(flags)
    assert (tmp_path / "audit.csv").read_text() == scores and "checkpoint 10 is damaged" in capsys.readouterr().err


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


def test_copies_under_two_labels_come_first_and_known_test_images_are_no_reason_to_refuse(tmp_path, capsys):
    digits = load("digits")
    rows = np.arange(0, 60, 3)
    labels = digits.train_labels[rows]
    labels[:6] = (labels[:6] + 1) % 10  # the other 14 copies agree
    images = np.concatenate([digits.train_images[:200], digits.train_images[rows]])
    given = np.concatenate([digits.train_labels[:200], labels])
    test_labels = digits.test_labels[:40].copy()
    test_labels[:2] = (digits.train_labels[100] + 1) % 10, digits.train_labels[101]
    test = np.concatenate([digits.train_images[100:102], digits.test_images[2:40]])  # 5 % of it, one under another label
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=given, test_images=test, test_labels=test_labels)
    flags = [
        "--data",
        str(tmp_path / "x.npz"),
        "--view",
        "none",
        "--epochs",
        "1",
        "--batch-size",
        "20",
        "--out",
        str(tmp_path / "out"),
    ]
    audit.main(flags)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "note: x: 2 of 40 test images are training images, bit for bit" in said
    assert (
        "13 training samples have a copy, the same bit for bit, under another label: not both are right. They come first"
        in said
    )
    disputed = {int(n) for n in (*rows[:6], *range(200, 206), 100)}
    with open(tmp_path / "out" / "audit.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert {int(row["index"]) for row in found[:13]} == disputed and len(found) == 220
    scores = [float(row["score"]) for row in found]
    assert scores[:13] == sorted(scores[:13], reverse=True) and scores[13:] == sorted(scores[13:], reverse=True)
    other = {int(row["index"]): row["other_labels"] for row in found}
    assert other[0] == str(labels[0]) and other[200] == str(digits.train_labels[0]) and other[100] == str(test_labels[0])
    assert {n for n, label in other.items() if label} == disputed
    page = (tmp_path / "out" / "sheet.html").read_text()
    assert page.count("a copy is labelled: ") == 13 and page.index("a copy is labelled") < page.index("</figure>")
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["disputed"] == 13
    with open(tmp_path / "out" / "duplicates.csv", newline="") as file:
        pairs = list(csv.DictReader(file))
    assert len(pairs) == 22 and [pair["labels"] for pair in pairs] == ["different"] * 7 + ["same"] * 15
    with pytest.raises(ValueError, match=r"got 2 of 40 test images.* listed in .*other.duplicates.csv"):
        train.main([*flags[:-2], "--out", str(tmp_path / "other")])
    assert (tmp_path / "other" / "duplicates.csv").read_text() == (tmp_path / "out" / "duplicates.csv").read_text()
    dropping = [
        *flags[:3],
        "drop_duplicates",
        *flags[4:-2],
        "--out",
        str(tmp_path / "other"),
    ]  # into the same folder, as advised
    train.main(dropping)
    assert "2 training images that are in the test or validation set were dropped" in capsys.readouterr().out.replace("\n", " ")


def test_files_are_named_beside_their_scores(tmp_path):
    for n, image in enumerate(np.rint(255 * load("digits").train_images[:60, ..., 0]).astype(np.uint8)):
        path = tmp_path / "photos" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    audit.main(["--data", str(tmp_path / "photos"), "--epochs", "1", "--batch-size", "6", "--out", str(tmp_path / "out")])
    with open(tmp_path / "out" / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    dataset = load(tmp_path / "photos")
    assert {row["index"]: row["name"] for row in rows} == dict(
        zip(map(str, dataset.train_index), dataset.train_names, strict=True)
    )
    assert all(row["name"][0] == row["given"] for row in rows)
    assert rows[0]["name"] in (tmp_path / "out" / "sheet.html").read_text()


def test_streamed_images_stay_off_the_device_and_an_error_in_the_timing_leaves_the_files(tmp_path, monkeypatch):
    from perturbjax.training import cost

    def failing(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cost, "device_data", failing)
    flags = ["--view", "thin(20)", "--epochs", "1", "--batch-size", "20", "--stream", "True", "--out", str(tmp_path)]
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(audit, "cost_ratios", failing)
        audit.main(flags)
    assert all((tmp_path / name).exists() for name in ("audit.csv", "sheet.html", "cleaned.npz"))
    monkeypatch.setattr(audit, "fit", None)  # the training is read from its checkpoint
    audit.main(flags)
    assert json.loads((tmp_path / "audit.json").read_text())["cost"]["recorder"] > 0


def arrays(**more):
    """A data set of 12 samples of three classes, whose last class has two."""
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    images = np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4)
    return check(Dataset("mine", images, labels, images[:3] + 50, labels[[0, 5, 10]], ("a", "b", "c"), **more)), labels


@pytest.mark.parametrize("relabel", [False, True])
def test_the_cleaned_set_keeps_validation_set_domains_and_names(relabel, tmp_path):
    domains = np.arange(12) % 2
    dataset, labels = arrays(
        train_domains=domains, test_domains=np.array([1, 0, 1]), domain_names=("day", "night"), train_index=np.arange(12)[::-1] + 5,
        validation_images=np.full([4, 4, 4], 9, np.uint8), validation_labels=np.array([2, 1, 0, 2]),
    )  # fmt: skip
    flagged, suggestion = np.arange(12) % 4 == 1, (labels + 1) % 3
    audit.write_cleaned(tmp_path / "cleaned.npz", dataset, flagged, suggestion, relabel=relabel)
    found, kept = load(tmp_path / "cleaned.npz"), np.ones(12, bool) if relabel else ~flagged
    assert (found.class_names, found.domain_names) == (("a", "b", "c"), ("day", "night"))
    np.testing.assert_array_equal(found.train_labels, np.where(flagged, suggestion, labels)[kept])
    for name in ("train_images", "train_index", "train_domains"):
        np.testing.assert_array_equal(getattr(found, name), getattr(dataset, name)[kept], err_msg=name)
    for name in ("test_images", "test_labels", "test_domains", "validation_images", "validation_labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(dataset, name), err_msg=name)


def test_the_cleaned_texts_keep_their_validation_set(tmp_path):
    texts = np.array(["good film", "bad film", "a good one", "très mauvais", "a bad one", "fine"], object)
    tokenizer = build_words(texts)
    rows, labels = tokenizer.rows(texts), np.array([1, 0, 1, 0, 0, 1])
    dataset = check(
        Dataset("toy", rows, labels, rows[:2], labels[:2], ("neg", "pos"), tokenizer=tokenizer, train_texts=texts, test_texts=texts[:2],
                validation_images=rows[2:4], validation_labels=labels[2:4], validation_texts=texts[2:4])
    )  # fmt: skip
    audit.write_cleaned(tmp_path / "cleaned.npz", dataset, np.arange(6) == 1, 1 - labels, relabel=False)
    found = load(tmp_path / "cleaned.npz")
    assert found.train_texts.tolist() == [t for i, t in enumerate(texts) if i != 1]
    assert found.test_texts.tolist() == texts[:2].tolist() and found.validation_texts.tolist() == texts[2:4].tolist()
    np.testing.assert_array_equal(found.validation_labels, dataset.validation_labels)


@pytest.mark.parametrize("relabel", [False, True])
def test_no_class_is_cleaned_away(relabel, tmp_path):
    dataset, labels = arrays()
    flagged = labels != 0  # all of b and c; those of c are to become b, those of b to become a
    suggestion = np.where(labels == 2, 1, 0)
    audit.write_cleaned(tmp_path / "cleaned.npz", dataset, flagged, suggestion, relabel=relabel)
    found = load(tmp_path / "cleaned.npz")  # refuses classes without samples
    np.testing.assert_array_equal(found.train_labels, labels)


def test_only_the_classes_that_would_vanish_keep_flagged_samples():
    _, labels = arrays()
    flagged = (labels == 2) | (np.arange(12) == 0)
    for relabel, expected in ((False, labels[1:]), (True, np.where(np.arange(12) == 0, 1, labels))):
        kept, found = audit.cleaned(labels, flagged, np.where(labels == 2, 0, 1), 3, relabel=relabel)
        np.testing.assert_array_equal(found[kept], expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evidence", "memry"], "Did you mean 'memory'"),
        (["--clean", "remove"], "There are: drop, relabel"),
        (["--epochs", "0"], "^--epochs needs epochs >= 1, got 0. Write --epochs 1.$"),
        (["--seeds", "0"], "needs seeds >= 1, got 0. Write --seeds 1"),
        (["--seed", "-1"], "needs seed >= 0, got -1. Write --seed 0"),
        (["--folds", "1"], "needs folds >= 2, got 1. Write --folds 2"),
        (["--folds", "0", "--evidence", "folds"], "needs folds >= 2, got 0. Write --folds 2"),
        (["--weight", "1"], "Write --weight 0.999"),
        (["--top", "-1"], "Write --top 0"),
        (["--method", "ce, lpl"], "one method"),
        (["--coordinator", "localhost:1", "--num-processes", "2"], "audit.py needs one process, got --coordinator localhost:1"),
        (["--view", "thin(7)", "--epochs", "1"], "which leave 6 of 70 out. Write --epochs 2 or more"),
        (["--view", "thin(3)", "--evidence", "folds"], "got 5 folds and a class of 3. Write --folds 3"),
        (["--view", "thin(4)+noise(pair, 0.2)"], "got 5 folds and a class of [1-4]. Write --folds"),  # of cleanlab
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_end_with_a_clear_error(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        audit.main([*flags, "--batch-size", "16", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("seed-*"))
