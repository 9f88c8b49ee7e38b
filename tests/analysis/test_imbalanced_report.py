"""perturbjax.analysis.report on an imbalanced test set: order, differences, missing classes, confusion matrices; and earlier results."""

import copy
import re

import numpy as np
import pytest

from perturbjax import analysis as pa
from perturbjax.analysis import confusion, plots
from perturbjax.analysis.ranking import headline, ordered
from tests.analysis.test_report import Page, printed

NAMES = ("ce", "head", "lpl(bound=varied(0.5, 1.0), split=frequency)")
C = 10


def scored(num_classes=C, seeds=3, test=None, names=NAMES):
    """Results of logits: "head" is right on frequent classes, the last method on rare ones."""
    counts = np.round(500 * 50 ** -np.linspace(0, 1, num_classes)).astype(int)
    test = counts // 10 + 1 if test is None else np.asarray(test)
    y, place, methods = np.repeat(np.arange(num_classes), test), np.linspace(-1, 1, num_classes), {}
    for i, name in enumerate(names):
        favour = (-0.6, -1.2, -0.2)[i] * place
        runs = []
        for seed in range(seeds):
            u = np.random.default_rng(seed).normal(size=[len(y), num_classes]) + 2 * np.eye(num_classes)[y] + favour
            runs.append(pa.evaluate(u, y, counts))
        over = lambda key, runs=runs: pa.summary([run[key] for run in runs])
        keys = ("accuracy", "balanced_accuracy", "macro_f1", "ece", "head", "medium", "tail")
        entry = {key: over(key) for key in keys} | {key: runs[0][key] for key in ("per_class", "precision", "f1", "confusion")}
        entry |= {
            "support": test.tolist(),
            "best_epoch_accuracy": over("accuracy"),
            "best_epoch_balanced_accuracy": over("balanced_accuracy"),
        }
        entry |= {"cost_ratio": 1.0 + i, "gradient_evaluations": 1.0, "seconds": 12.5}
        curve = lambda key, runs=runs: [[run[key] / 2, run[key]] for run in runs]
        entry["learning_curve"] = {"epoch": [1, 2]} | {key: curve(key) for key in keys[:3]}
        for difference, key in (("difference", "accuracy"), ("balanced_difference", "balanced_accuracy")):
            first = (methods.get(names[0]) or entry)[key]["values"]
            entry[difference] = pa.paired_difference(entry[key]["values"], first) if i else None
        methods[name] = entry
    names = [f"class {c}" for c in range(num_classes)]
    data = {
        "name": "mine",
        "train_size": int(counts.sum()),
        "test_size": len(y),
        "class_counts": counts.tolist(),
        "class_names": names,
    }
    data |= {
        "test_counts": test.tolist(),
        "test_balanced": pa.is_balanced(test),
        "notes": ["a note <of the data>"],
        "views": [],
    }
    return {"command": "python x", "data": data, "settings": {"seeds": list(range(seeds))}, "methods": methods}


def means(results, key):
    return [results["methods"][name][key]["mean"] for name in NAMES]


def earlier(results):
    """What a version without balanced accuracy wrote."""
    results = copy.deepcopy(results)
    for key in ("test_counts", "test_balanced"):
        del results["data"][key]
    new = ("balanced_accuracy", "macro_f1", "best_epoch_balanced_accuracy", "balanced_difference")
    for entry in results["methods"].values():
        for key in (*new, "precision", "f1", "support", "confusion"):
            del entry[key]
        entry["learning_curve"] = {key: entry["learning_curve"][key] for key in ("epoch", "accuracy")}
    return results


def rows(text):
    return [line for line in text.splitlines() if re.match(r"(ce|head|lpl\(\S*) ", line)]


def test_an_imbalanced_test_set_orders_by_balanced_accuracy_and_a_balanced_one_as_typed():
    results = scored()
    accuracy, balanced = means(results, "accuracy"), means(results, "balanced_accuracy")
    assert np.argmax(accuracy) == 1 and np.argsort(balanced).tolist() == [1, 0, 2]  # they disagree about the best
    text, markdown = printed(results), pa.markdown(results)
    assert [line.split("(")[0].split(" ")[0] for line in rows(text)] == ["lpl", "ce", "head"]
    assert re.findall(r"^\| `(\w+)", markdown, re.MULTILINE) == ["lpl", "ce", "head"]
    assert text.splitlines()[0].split()[:4] == ["method", "balanced", "acc.", "F1"]
    assert "not balanced" in text and "points of balanced accuracy" in " ".join(text.split())
    difference = results["methods"]["head"]["balanced_difference"]
    assert f"{100 * difference['mean']:.1f} [{100 * difference['low']:.1f}, {100 * difference['high']:.1f}]" in text
    even = scored(test=[20] * C)
    assert [line.split("(")[0].split(" ")[0] for line in rows(printed(even))] == ["ce", "head", "lpl"]
    assert printed(even).splitlines()[0].split()[:4] == ["method", "accuracy", "bal.", "F1"] and "not balanced" not in printed(
        even
    )
    assert means(even, "accuracy") == pytest.approx(means(even, "balanced_accuracy"))


def test_the_page_says_what_the_table_says(tmp_path):
    results = scored()
    for key, sign in (("difference", 1), ("balanced_difference", -1)):  # better by accuracy, and worse
        results["methods"]["head"][key] = {"mean": 0.02 * sign, "low": 0.01 * sign, "high": 0.01 * sign, "n": 3}
    path = pa.write_report(results, tmp_path / "report.html")
    page, html = Page(path, images=True), path.read_text()
    best = results["methods"][NAMES[2]]["balanced_accuracy"]
    assert (
        f"Highest balanced accuracy (the test set is not balanced) at the last epoch: {NAMES[2]} with {100 * best['mean']:.1f}"
        in page.text
    )
    assert "worse than ce: head" in page.text
    assert "Note: a note <of the data>" in page.text and "not balanced: from 51 (class 0) down to 2 (class 8)" in page.text
    assert "Balanced accuracy minus that of ce" in page.text and "Test balanced accuracy by epoch" in page.text
    head = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert head[1].startswith("balanced<small>") and head[2].startswith("accuracy<small>") and head[3].startswith("macro F1")
    # The reference is black and a circle wherever it stands.
    table = html[html.index("<h2>The numbers") :]
    assert table.index(plots.swatch(2)) < table.index(plots.swatch(0)) < table.index(plots.swatch(1))
    for title in ("Accuracy (recall) in %", "Precision in %", "F1 in %", "Confusion matrices", "Most confused pairs"):
        assert title in page.text
    shown = results["methods"]["ce"]["precision"][0]
    assert f"{100 * shown:.1f}" in page.text


def test_results_of_earlier_versions_show_what_they_have(tmp_path):
    old = earlier(scored())
    text, page = printed(old), Page(pa.write_report(old, tmp_path / "report.html")).text
    assert [line.split("(")[0].split(" ")[0] for line in rows(text)] == ["ce", "head", "lpl"]
    assert "balanced" not in text and "F1" not in text and headline(old) == "accuracy"
    assert "Highest test accuracy" in page and "Confusion" not in page and "None" not in page
    # A run that an earlier version began has no curve of balanced accuracy; the rest is there.
    mixed = scored()
    del mixed["methods"]["ce"]["learning_curve"]["balanced_accuracy"]
    mixed["methods"]["ce"]["best_epoch_balanced_accuracy"] = None
    page = Page(pa.write_report(mixed, tmp_path / "report.html"), images=True).text
    assert "Test accuracy by epoch" in page and "Highest balanced accuracy" in page


def test_a_group_without_test_samples_keeps_its_column_and_a_missing_class_is_said(tmp_path):
    results = scored(test=[40, 30, 20, 20, 20, 10, 10, 0, 0, 0])
    text = printed(results, width=100)
    assert results["methods"]["ce"]["tail"]["mean"] is None
    assert text.splitlines()[0].split()[4:7] == ["head", "med.", "tail"]
    assert all(
        re.search(r" – ", line) for line in rows(text)
    ) and "3 of 10 classes have no test sample and are in no mean" in " ".join(text.split())
    page = Page(pa.write_report(results, tmp_path / "report.html"), images=True).text
    assert "over the 7 classes that have test samples" in page and "Grey rows have no test sample" in page


@pytest.mark.parametrize(("width", "last"), [(80, "cost"), (90, "secs"), (120, "secs")])
def test_columns_give_way_before_names_do(width, last):
    results = scored()
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width and text.splitlines()[0].split()[-1] == last
    assert any(line.startswith("lpl(bound=varied(") for line in text.splitlines())
    assert ("gradient evaluations" in " ".join(text.split())) == (last == "secs")


def test_a_method_without_a_number_comes_last():
    results = scored()
    results["methods"]["ce"]["balanced_accuracy"] = pa.summary([None, 0.5, 0.5])
    assert ordered(results) == [NAMES[2], "head", "ce"] and rows(printed(results))[-1].startswith("ce ")


def test_the_picture_has_the_shares_of_the_rows_frequent_classes_first():
    results = scored(test=[40, 30, 20, 20, 20, 10, 10, 5, 5, 0])
    method = results["methods"]["ce"]
    place = np.arange(C)[::-1]  # as if the last class were the most frequent
    shares = confusion.row_shares(method, place, C)
    whole = np.zeros([C, C])
    whole[method["confusion"]["true"], method["confusion"]["predicted"]] = method["confusion"]["count"]
    assert whole.sum() == 160
    np.testing.assert_allclose(shares[::-1, ::-1][:9], 100 * whole[:9] / whole[:9].sum(1, keepdims=True))
    assert np.isnan(shares[0]).all()  # class 9 has no sample
    np.testing.assert_allclose(np.diag(shares)[1:], 100 * np.array(method["per_class"][:9])[::-1])
    pooled = confusion.row_shares(method, np.arange(C) // 5, 2)  # groups of neighbours: their samples together
    np.testing.assert_allclose(pooled[0, 1], 100 * whole[:5, 5:].sum() / 130)


def test_the_most_confused_pairs_are_the_largest_shares_of_a_class():
    method = scored()["methods"]["ce"]
    entries = zip(*(method["confusion"][key] for key in ("true", "predicted", "count")), strict=True)
    expected = sorted((n / method["support"][t] for t, p, n in entries if t != p), reverse=True)[:3]
    found = confusion.most_confused(method, 3)
    assert [pair.share for pair in found] == pytest.approx(expected) and all(pair.true != pair.predicted for pair in found)


def test_so_many_methods_are_drawn_and_the_page_says_how_many(tmp_path):
    results = scored(seeds=1)
    results["methods"] = {f"ce{i}": results["methods"]["ce"] for i in range(14)}
    assert confusion.confusion_plot(results, 8.4).count("data:image/png") == 12 + 1  # and the scale
    page = Page(pa.write_report(results, tmp_path / "report.html"), images=True).text
    assert "Of the first 12 of 14 methods; results.json has all." in page


@pytest.mark.parametrize("num_classes", [2, 100, 1000])
def test_the_picture_stays_small_and_its_labels_few(num_classes):
    results = scored(num_classes, seeds=1)
    for width in (8.4, 3.7):
        svg = confusion.confusion_plot(results, width)
        assert (
            len(svg) < 300_000 and svg.count(">class ") <= 2 * 3 * 35 and svg.count("data:image/png") == 4
        )  # three and the scale
        for name in ("ce", "head"):
            assert f">{name}<" in svg
