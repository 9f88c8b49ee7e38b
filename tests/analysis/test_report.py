"""perturbjax.analysis.report: what a reader gets, on invented results from one seed and two classes to 1000 classes."""

import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from perturbjax import analysis as pa
from perturbjax.analysis import plots

SEVEN = ("ce", "la", "lpl(bound=varied)", "lpg", "lpa", "sam", "pugd")
VOID = {"meta", "br", "wbr"}


def invent(names=SEVEN, num_classes=10, seeds=3, epochs=4, ratio=100):
    """Results as compare.py would write them."""
    rng = np.random.default_rng(0)
    counts = np.round(500 * ratio ** -np.linspace(0, 1, num_classes)).astype(int)
    methods, first = {}, None
    for i, name in enumerate(names):
        runs = np.clip(0.5 + 0.02 * i + 0.3 * counts / 500 + rng.normal(0, 0.01, [seeds, num_classes]), 0, 1)
        logits = [np.log(np.stack([p, 1 - p], 1) + 1e-9) for p in runs]
        group = lambda key, runs=runs: (
            pa.summary([run[getattr(pa.groups_by_frequency(counts), key)].mean() for run in runs]) if ratio > 1 else None
        )
        accuracy = pa.summary(runs.mean(1))
        first = first or accuracy
        methods[name] = {
            "accuracy": accuracy,
            "best_epoch_accuracy": pa.summary(runs.mean(1) + 0.01),
            "top5": pa.summary(runs.mean(1) + 0.1) if num_classes > 10 else None,
            "ece": pa.summary([pa.expected_calibration_error(u, np.zeros(len(u), int)) for u in logits]),
            **{key: group(key) for key in ("head", "medium", "tail")},
            "per_class": pa.mean_by_class(runs),
            "cost_ratio": 1 + i / 2,
            "gradient_evaluations": 1.0 + (name in ("sam", "pugd")),
            "inner_evaluations": 3.0 * name.startswith("lpl"),
            "seconds": 12.5,
            "learning_curve": {
                "epoch": list(range(1, epochs + 1)),
                "accuracy": (runs.mean(1)[:, None] * np.linspace(0.5, 1, epochs)).tolist(),
            },
            "relative_loss_variation": None if i == 0 else (0.5 - counts / 500).tolist(),
            "difference": None if i == 0 else pa.paired_difference(accuracy["values"], first["values"]),
        }
    return {
        "command": f"python experiments/compare.py --methods '{', '.join(names)}'",
        "versions": {"perturbjax": "0.1.0", "jax": "0.10.2"},
        "data": {
            "name": "digits",
            "train_size": int(counts.sum()),
            "test_size": 360,
            "class_counts": counts.tolist(),
            "class_names": [f"class {c}" for c in range(num_classes)],
            "subset_hash": [f"hash{s}" for s in range(seeds)],
            "views": [f"long tail {ratio}"],
            "image_shape": [8, 8, 1],
        },
        "settings": {"model": "mlp", "epochs": epochs, "batch_size": 64, "seeds": list(range(seeds))},
        "methods": methods,
    }


class Page(HTMLParser):
    """Checks that tags close in order; collects text, tag names and attributes. images: of links, leaves out pictures in the page."""

    def __init__(self, path, images=False):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], set(), [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        pictures = [link for link in self.links if link.startswith("data:image/png;base64,")]
        assert bool(pictures) == images
        self.links = [link for link in self.links if link not in pictures]
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links) and not self.tags & {"script", "link"}

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "action")]
        assert not any(k.startswith("on") for k in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open[-1:] == ["style"] else data


def printed(results, width=80, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    pa.print_table(results, Console(file=out, width=width))
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_page_stands_alone_and_says_everything(tmp_path):
    results = invent()
    page = Page(pa.write_report(results, tmp_path / "new" / "report.html"))
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    for text in (*SEVEN, results["command"], "jax 0.10.2", "digits", "8 × 8 × 1", "long tail 100", "class 3", "hash1", "mlp"):
        assert text in page.text, text
    la = results["methods"]["la"]
    for entry in (la["accuracy"], la["best_epoch_accuracy"]):
        assert f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}" in page.text
    assert f"[{100 * la['difference']['low']:.1f}, {100 * la['difference']['high']:.1f}]" in page.text
    assert f"{100 * la['tail']['mean']:.1f}" in page.text and "+ 3.00 inner" in page.text
    assert "Learning curves" in page.text and "Loss variation by class" in page.text


def test_same_results_give_the_same_bytes(tmp_path):
    results = invent(SEVEN[:2])
    first = pa.write_report(results, tmp_path / "a.html").read_bytes()
    saved = pa.load_results(pa.save_results(results, tmp_path / "results.json"))
    assert pa.write_report(saved, tmp_path / "b.html").read_bytes() == first
    assert pa.write_report(saved, tmp_path / "a.html").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html", "results.json"]  # no drafts left


def test_what_users_type_is_escaped(tmp_path):
    evil = "<script>alert(\"$x_1$ & 'y'\")</script>"
    results = invent(("ce", evil))
    results["command"] = results["settings"][evil] = results["data"]["name"] = results["versions"][evil] = evil
    results["data"]["views"], results["data"]["class_names"][0] = [evil], evil
    path = pa.write_report(results, tmp_path / "report.html")
    assert "<script" not in path.read_text(encoding="utf-8")
    page = Page(path)
    assert page.text.count(evil) >= 5  # as text it is all there


def test_names_in_any_script_and_of_any_length(tmp_path):
    long = "adversarial(site=stage1, granularity=category, bound=0.031, step_size=0.007) + la(tau=1.25)"
    results = invent(("ce", "摂動", long))
    results["data"]["class_names"] = ["猫"] * 10
    page = Page(pa.write_report(results, tmp_path / "report.html"))
    assert "摂動" in page.text and long in page.text and "猫" in page.text


def test_missing_numbers_are_left_out(tmp_path):
    results = invent(SEVEN[:3], seeds=2)
    for m in results["methods"].values():
        m |= dict.fromkeys(("best_epoch_accuracy", "head", "medium", "tail", "cost_ratio", "relative_loss_variation"))
        m |= {"learning_curve": None, "difference": None}
    results["methods"]["la"] |= {"accuracy": pa.summary([None, 0.5]), "per_class": [None] * 10, "ece": None}
    results["data"] |= {"image_shape": None, "views": [], "subset_hash": None}
    page = Page(pa.write_report(results, tmp_path / "report.html"))
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    assert "best epoch" not in page.text and "Learning curves" not in page.text and "against cost" not in page.text
    text = printed(results)
    assert "head" not in text and "cost" not in text
    assert re.search(r"la +– ", text)
    for m in results["methods"].values():
        m["accuracy"] = None
    assert "every run failed" in Page(pa.write_report(results, tmp_path / "report.html")).text


def test_one_seed_claims_no_interval(tmp_path):
    results = invent(SEVEN[:2], num_classes=2, seeds=1, epochs=1, ratio=1)
    page = Page(pa.write_report(results, tmp_path / "report.html"))
    assert "With one seed no interval" in page.text and "±" not in page.text and "rarest" not in page.text
    assert "±" not in printed(results) and "one seed" in printed(results)


def test_verdicts_follow_the_intervals(tmp_path):
    results = invent(("ce", "up", "down", "even"))
    for name, low, high in (("up", 0.01, 0.02), ("down", -0.02, -0.01), ("even", -0.01, 0.01)):
        results["methods"][name]["difference"] = {"mean": (low + high) / 2, "low": low, "high": high, "n": 3}
    path = pa.write_report(results, tmp_path / "report.html")
    assert "better than ce: up; worse than ce: down; not told apart from ce by these runs: even." in Page(path).text
    bold = re.findall(r"<td><b>(.*?)</b><small>(.*?)</small>", path.read_text(encoding="utf-8"))
    assert bold == [("+1.5", "[1.0, 2.0]"), ("−1.5", "[−2.0, −1.0]")]
    assert "0.0 [-1.0, 1.0]" in printed(results)  # and not -0.0 or +0.0


def test_a_thousand_classes_and_twelve_methods(tmp_path):
    names = [*SEVEN, *(f"m{i}(bound=0.5, step_size={i})" for i in range(5))]
    path = pa.write_report(invent(names, num_classes=1000, seeds=1), tmp_path / "report.html")
    assert path.stat().st_size < 2e6
    assert path.read_text(encoding="utf-8").count(">class ") < 50  # no thousand labels
    text = Page(path).text
    assert all(name in text for name in names)


def test_each_method_looks_different_and_the_reference_is_black():
    styles = [plots.style(i) for i in range(12)]
    assert len(set(styles)) == 12 and [s.color == "#222222" for s in styles] == [True] + 11 * [False]
    assert len({(s.color, str(s.dashes)) for s in styles}) == 12  # without the markers too
    assert all(plots.style(i).color in plots.swatch(i) for i in range(12))


def test_long_names_keep_their_ends():
    assert plots.shorten("lpl", 10) == "lpl"
    assert plots.shorten("lpl(bound=0.1, step_size=0.2)", 11) == "lpl(b…=0.2)"
    for lines in (1, 2, 3):
        parts = plots.shorten("lpl(bound=0.1, step_size=0.2) + mixup(alpha=0.25)", 14, lines).split("\n")
        assert len(parts) <= lines and max(map(len, parts)) <= 14


def test_classes_are_grouped_only_when_there_are_many():
    assert [b.tolist() for b in plots.class_bins([1, 3, 2])] == [[1], [2], [0]]
    bins = plots.class_bins(np.arange(1000))
    assert len(bins) == 20 and sorted(np.concatenate(bins)) == list(range(1000)) and 999 in bins[0]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_table_fits_the_terminal(width, encoding):
    results = invent([*SEVEN, "lpl(bound=2.5, step_size=0.1) + la(tau=1.0)"])
    text = printed(results, width, encoding)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    la, mark = results["methods"]["la"], "±" if encoding == "utf-8" else "+/-"
    row = next(line for line in text.splitlines() if line.startswith("la "))
    assert f"{100 * la['accuracy']['mean']:.1f} {mark} {100 * la['accuracy']['std']:.1f}" in row
    assert f"+{100 * la['difference']['mean']:.1f} [" in row
    assert width == 120 or row.rstrip().endswith("1.50  1.00 12.5")
    assert any(line.startswith("lpl(bound=varied) ") for line in text.splitlines())  # in one piece at 80 too


def test_table_takes_names_as_they_are():
    results = invent(("ce", "[red]lpl[/red]", "摂動"))
    assert "[red]lpl[/red]" in printed(results) and "摂動" in printed(results)
    assert r"\u6442\u52d5" in printed(results, encoding="ascii")


def test_results_survive_the_file(tmp_path):
    results = invent(SEVEN[:2])
    path = pa.save_results(results, tmp_path / "results.json")
    assert pa.load_results(path) == json.loads(json.dumps(results))
    assert max(map(len, path.read_text().splitlines())) < 1000 and len(path.read_text().splitlines()) < 200


def test_file_is_strict_json(tmp_path):
    results = {"methods": {"ce": {"x": np.float32("nan"), "y": [np.inf, np.int64(3)], "z": np.arange(2), "[\n 1 ]": True}}}
    path = pa.save_results(results, tmp_path / "results.json")
    assert pa.load_results(path)["methods"]["ce"] == {"x": None, "y": [None, 3], "z": [0, 1], "[\n 1 ]": True}
    path.write_text('{"methods": {"ce": NaN}}')
    with pytest.raises(ValueError, match="got NaN in .*results.json"):
        pa.load_results(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="at least one entry in 'methods'"):
        pa.load_results(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = pa.save_results(invent(SEVEN[:1]), tmp_path / "results.json")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        pa.save_results({"methods": {"ce": object()}}, path)
    with pytest.raises(UnicodeEncodeError):
        pa.save_results({"methods": {"\ud800": {}}}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_markdown_has_the_tables_numbers(tmp_path):
    results = invent(("ce", "a|b"))
    text = pa.write_markdown(results, tmp_path / "table.md").read_text()
    header, line, first, second = [row for row in text.splitlines() if row.startswith("|")]
    cells = lambda row: [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert len(cells(header)) == len(cells(line)) == len(cells(first)) == len(cells(second))
    assert cells(header)[:2] == ["method", "accuracy"] and cells(second)[0] == r"`a\|b`"
    mean, std = (100 * results["methods"]["ce"]["accuracy"][key] for key in ("mean", "std"))
    assert cells(first)[1] == f"{mean:.1f} ± {std:.1f}"
    assert "paired over seeds" in text.splitlines()[-1]
