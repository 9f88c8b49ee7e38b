"""What the scripts say of a test set: notes, balanced numbers against scikit-learn, order, earlier versions' runs, seeds side by side."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from experiments import compare, domains, shared, sweep, train
from experiments.shared import tested
from perturbjax.data import Dataset, check, load
from perturbjax.training import History
from perturbjax.training.folder import FINISHED

pytestmark = pytest.mark.optax_promotes  # schedules

TRAIN, TEST = [80, 80, 60, 50, 40, 30, 20, 10, 6, 4], [45, 40, 30, 20, 15, 10, 6, 4, 3, 2]
QUICK = ["--view", "none", "--epochs", "3", "--batch-size", "32", "--cost-rounds", "0"]


def write(path, test=TEST, train_counts=TRAIN):
    """Digits with as many samples of each class."""
    digits = load("digits")
    images, labels = digits.train_images, digits.train_labels
    of = [np.flatnonzero(labels == c) for c in range(10)]
    rows = {
        "train": np.concatenate([rows[:n] for rows, n in zip(of, train_counts, strict=True)]),
        "test": np.concatenate([rows[n : n + m] for rows, n, m in zip(of, train_counts, test, strict=True)]),
    }
    arrays = {
        f"{part}_{name}": array[own] for part, own in rows.items() for name, array in (("images", images), ("labels", labels))
    }
    np.savez(path, **arrays, class_names=np.array([f"digit {c}" for c in range(10)]))
    return str(path)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def dataset(train_labels, test_labels, num_classes=4):
    images = lambda labels: np.zeros([len(labels), 2, 2, 1], np.uint8)
    names = tuple("abcd"[:num_classes])
    return check(
        Dataset("mine", images(train_labels), np.array(train_labels), images(test_labels), np.array(test_labels), names)
    )


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory):
    """A comparison on an imbalanced test set."""
    folder = tmp_path_factory.mktemp("imbalanced")
    data = write(folder / "mine.npz")
    flags = ["--data", data, *QUICK, "--methods", "ce, la, sam", "--seeds", "2"]
    compare.main([*flags, "--out", str(folder / "out")])
    return flags, folder / "out"


def finished(out):
    return {path.parent.name: History.load(path) for path in out.rglob(FINISHED)}


def test_the_numbers_of_a_comparison_are_scikit_learns(imbalanced):
    flags, out = imbalanced
    found, y = results(out), np.load(flags[1])["test_labels"]
    assert found["data"]["test_counts"] == TEST and found["data"]["test_balanced"] is False
    first = found["methods"]["ce"]
    for typed, entry in found["methods"].items():
        runs = [History.load(shared.run_place(out, typed) / f"seed-{seed}" / FINISHED) for seed in range(2)]
        guesses = [run.logits.argmax(1) for run in runs]
        over = lambda score, guesses=guesses: [score(y, guess) for guess in guesses]
        balanced, f1 = over(sk.balanced_accuracy_score), over(lambda y, guess: sk.f1_score(y, guess, average="macro"))
        assert entry["accuracy"]["values"] == pytest.approx(over(sk.accuracy_score))
        assert entry["balanced_accuracy"]["values"] == pytest.approx(balanced)
        assert entry["macro_f1"]["values"] == pytest.approx(f1)
        curve = entry["learning_curve"]
        assert [run[-1] for run in curve["balanced_accuracy"]] == pytest.approx(balanced) and np.shape(curve["macro_f1"]) == (
            2,
            3,
        )
        assert [run[-1] for run in curve["macro_f1"]] == pytest.approx(f1)
        assert entry["best_epoch_balanced_accuracy"]["values"] == pytest.approx(np.max(curve["balanced_accuracy"], axis=1))
        recall = np.mean(over(lambda y, guess: sk.recall_score(y, guess, average=None)), axis=0)
        assert entry["per_class"] == pytest.approx(recall) and entry["support"] == [2 * n for n in TEST]
        matrix = np.zeros([10, 10], int)
        matrix[entry["confusion"]["true"], entry["confusion"]["predicted"]] = entry["confusion"]["count"]
        np.testing.assert_array_equal(matrix, sum(over(sk.confusion_matrix)))
        if typed != "ce":
            paired = np.subtract(entry["balanced_accuracy"]["values"], first["balanced_accuracy"]["values"])
            assert entry["balanced_difference"]["mean"] == pytest.approx(paired.mean())
    lines = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).read_text().splitlines()]
    assert all({"accuracy", "balanced_accuracy", "macro_f1"} <= set(line) for line in lines)


def test_the_table_is_ordered_and_a_note_says_why(imbalanced, capsys):
    flags, out = imbalanced
    compare.main([*flags, "--out", str(out)])
    said, methods = capsys.readouterr().out, results(out)["methods"]
    assert "note: the test set is not balanced, from 45 samples of class 'digit 0' down to 2 of 'digit 9'" in said
    order = sorted(methods, key=lambda typed: -methods[typed]["balanced_accuracy"]["mean"])
    assert order != list(methods) and [line.split()[0] for line in said.splitlines() if line.split()[0] in methods] == order
    assert "Confusion matrices" in (out / "report.html").read_text() and "An earlier version" not in said


def test_runs_side_by_side_give_the_same_numbers(imbalanced, tmp_path):
    flags, out = imbalanced
    compare.main([*flags, "--methods", "ce, la", "--vmapped", "True", "--out", str(tmp_path)])
    for typed, entry in results(tmp_path)["methods"].items():
        alone = results(out)["methods"][typed]
        for key in ("balanced_accuracy", "macro_f1"):
            assert entry[key]["values"] == pytest.approx(alone[key]["values"])
            assert entry["learning_curve"][key] == pytest.approx(np.array(alone["learning_curve"][key]))
        assert entry["confusion"] == alone["confusion"]


def test_runs_and_results_of_an_earlier_version_are_read(imbalanced, tmp_path, capsys):
    """Its runs have no balanced accuracy by epoch, its results none at all."""
    flags, whole = imbalanced
    flags = [*flags, "--methods", "ce", "--seeds", "1", "--out", str(tmp_path)]
    compare.main(flags)
    history = History.load(shared.run_place(tmp_path, "ce") / "seed-0" / FINISHED)
    with np.load(file := shared.run_place(tmp_path, "ce") / "seed-0" / FINISHED) as kept:
        arrays = dict(kept)
    record = json.loads(str(arrays["record"]))
    del record["balanced_accuracy"], record["macro_f1"]
    np.savez(file, **arrays | {"record": np.array(json.dumps(record))})
    old = History.load(file)
    assert old.balanced_accuracy == [] and old.accuracy == history.accuracy
    found = results(tmp_path)
    entry = found["methods"]["ce"]
    new = ("balanced_accuracy", "macro_f1", "best_epoch_balanced_accuracy", "balanced_difference", "precision", "f1", "support")
    for key in (*new, "confusion"):
        del entry[key]
    del entry["learning_curve"]["balanced_accuracy"], found["data"]["test_balanced"], found["data"]["test_counts"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    capsys.readouterr()
    compare.main(flags)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"An earlier version wrote the results: for balanced accuracy, macro F1, precision and confusion matrices delete {tmp_path}"
        in said
    )
    assert f"ce {100 * entry['accuracy']['mean']:.1f}" in said
    (tmp_path / "results.json").unlink()
    compare.main(flags)
    again = results(tmp_path)["methods"]["ce"]
    assert again["balanced_accuracy"]["values"] == results(whole)["methods"]["ce"]["balanced_accuracy"]["values"][:1]
    assert set(again["learning_curve"]) == {"epoch", "accuracy"} and again["best_epoch_balanced_accuracy"] is None


def test_train_and_sweep_say_it_too(imbalanced, tmp_path, capsys):
    data = imbalanced[0][:2]
    train.main([*data, *QUICK[:-2], "--method", "la", "--out", str(tmp_path / "train")])
    assert "note: the test set is not balanced" in capsys.readouterr().out
    one = results(tmp_path / "train")["methods"]["la"]
    beside = results(imbalanced[1])["methods"]["la"]
    assert one["balanced_accuracy"]["values"] == pytest.approx(beside["balanced_accuracy"]["values"][:1])
    over = ["--method", "la", "--over", "tau=0.5, 1.0", "--seeds", "1", "--out", str(tmp_path / "sweep")]
    sweep.main([*data, *QUICK, *over])
    said = capsys.readouterr().out
    assert "note: the test set is not balanced" in said and "balanced acc." in said
    assert "test balanced accuracy" in (tmp_path / "sweep" / "tau.svg").read_text()


def test_classes_and_groups_without_test_samples_are_named(tmp_path, capsys):
    data = write(tmp_path / "mine.npz", test=[20] * 7 + [0] * 3)
    compare.main(["--data", data, *QUICK, "--methods", "ce", "--seeds", "1", "--out", str(tmp_path / "out")])
    said, found = capsys.readouterr().out, results(tmp_path / "out")
    missing = "classes 'digit 7', 'digit 8' and 'digit 9' have no test sample: nobody knows how well they are classified."
    assert f"note: {missing}" in said and said.count("digit 7") == 1 and "are over the 7 classes that are tested" in said
    assert "note: tail: none of its classes has a test sample, so it has no accuracy." in said and "not balanced" not in said
    shown = [note for note in found["data"]["notes"] if "digit 7" in note]  # once in the report, too
    assert len(shown) == 1 and missing in shown[0] and found["data"]["test_balanced"] is True
    assert "<dd>20 of each class; 3 classes without any</dd>" in (tmp_path / "out" / "report.html").read_text()
    entry = found["methods"]["ce"]
    assert entry["per_class"][7:] == [None] * 3 and entry["tail"]["values"] == [None] and entry["head"]["mean"] is not None
    assert entry["balanced_accuracy"]["mean"] == pytest.approx(np.mean(entry["per_class"][:7]))
    assert " tail " in said.splitlines()[-8] or any(
        line.split()[-3:] == ["tail", "grads", "secs"] for line in said.splitlines()
    )


def test_notes_tell_apart_the_seeds_whose_test_set_lacks_a_class():
    rare, all_there = [0] * 5 + [1] * 4 + [2] * 3 + [3], [0, 1, 2, 3]
    one, other = dataset(rare, all_there), dataset(rare, [0, 1, 2, 2])
    assert tested.notes_on_test_sets([one, one]) == []
    found = tested.notes_on_test_sets([one, other])
    assert found[0].startswith("class 'd' has no test sample under seed 1: nobody knows how well it is classified.")
    assert found[1] == "tail: none of its classes has a test sample under seed 1, so it has no accuracy."
    two = dataset([0, 0, 0, 1], [0, 1], num_classes=2)
    assert tested.notes_on_test_sets([two]) == []
    many = [f"{n}" for n in range(12)]
    assert tested.listed(range(12), many) == "12 classes ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9', …)"


def test_a_left_out_domain_that_is_not_balanced_orders_the_table(tmp_path, capsys):
    """Two domains of three classes; class 0 is the most frequent one of the second."""
    rng = np.random.default_rng(0)
    counts = {0: (30, 30, 30), 1: (60, 20, 10)}
    labels = np.concatenate([np.repeat(np.arange(3), own) for own in counts.values()])
    of = np.repeat([0, 1], [90, 90])
    images = rng.integers(0, 60, (180, 8, 8, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3] += 60
    np.savez(
        tmp_path / "TINY.npz",
        images=images,
        labels=labels,
        domains=of,
        class_names=np.array(list("xyz")),
        domain_names=np.array(["art", "photo"]),
    )
    flags = [
        "--data",
        str(tmp_path / "TINY.npz"),
        "--steps",
        "4",
        "--evaluate-every",
        "2",
        "--batch-size",
        "6",
        "--model",
        "mlp",
        "--width",
        "4",
    ]
    flags += ["--methods", "erm, sam", "--seeds", "2", "--out", str(tmp_path / "out")]
    domains.main(flags)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "domains.json").read_text())
    assert (
        "note: The classes of 'photo' are not balanced" in said and "Balanced accuracy in %, which orders the methods" in said
    )
    for entry in found["methods"].values():
        runs = entry["runs"]
        for run in runs:
            support = np.array(run["support"])
            assert run["balanced_accuracy"] == pytest.approx(np.mean(run["per_class"])) and run["macro_f1"] == pytest.approx(
                np.mean(run["f1"])
            )
            assert run["accuracy"] == pytest.approx(np.dot(run["per_class"], support) / support.sum())
            assert sum(run["confusion"]["count"]) == run["sizes"]["test"] == support.sum()
        for name in ("art", "photo"):
            assert entry["balanced_accuracy"]["domains"][name]["values"] == [
                r["balanced_accuracy"] for r in runs if r["domain"] == name
            ]
    order = sorted(found["methods"], key=lambda typed: -found["methods"][typed]["balanced_accuracy"]["mean"]["mean"])
    assert [line.split()[0] for line in said.splitlines() if line.split()[:1] and line.split()[0] in order][:2] == order
    for file in (tmp_path / "out").rglob("finished.json"):  # as an earlier version left them
        record = json.loads(file.read_text())
        for key in ("balanced_accuracy", "macro_f1", "per_class", "precision", "f1", "support", "confusion"):
            del record[key]
        file.write_text(json.dumps(record))
    domains.main(flags)
    said = capsys.readouterr().out
    assert "0 of 8 runs trained" in said and "Accuracy in %:" in said and "Balanced accuracy in %" not in said
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("| method | art | photo | mean |") and "macro F1" not in table
