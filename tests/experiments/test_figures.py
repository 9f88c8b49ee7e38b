"""experiments/figures.py draws what the other scripts wrote."""

import json

import pytest

from experiments import figures


def test_norms_of_right_and_wrong_labels(tmp_path):
    rows = [
        "index,given,suggested,score,flagged,logpert,true",
        *(f"{i},a,b,1,0,{i / 10},{'a' if i < 15 else 'b'}" for i in range(20)),
    ]
    (tmp_path / "audit.csv").write_text("\n".join(rows) + "\n")
    figures.main(["norms", "--audit", str(tmp_path), "--out", str(tmp_path / "norms.svg")])
    svg = (tmp_path / "norms.svg").read_text()
    assert svg.startswith("<svg") and "wrong labels" in svg and "right labels" in svg
    with pytest.raises(FileNotFoundError, match="audit.csv is missing"):
        figures.main(["norms", "--audit", str(tmp_path / "none")])


def test_accuracy_against_a_setting(tmp_path):
    methods = {"ce": 0.8, "ls(weight=0.1)": 0.81, "ls(weight=0.3)": 0.82, "la+ls(weight=0.2)": 0.9}
    entry = lambda mean: {"accuracy": {"mean": mean, "std": 0.01, "values": [mean]}}
    (tmp_path / "results.json").write_text(json.dumps({"methods": {name: entry(mean) for name, mean in methods.items()}}))
    flags = ["sensitivity", "--results", str(tmp_path / "results.json"), "--out", str(tmp_path / "out.svg"), "--setting"]
    figures.main([*flags, "weight"])
    svg = (tmp_path / "out.svg").read_text()
    assert all(f">{name}<" in svg for name in ("ls", "la+ls", "ce", "weight"))
    with pytest.raises(ValueError, match="'tau' as a number"):
        figures.main([*flags, "tau"])


def test_a_setting_is_taken_out_of_a_method():
    assert figures.without("la+lpl(bound=0.5, split=frequency)", "bound") == ("la+lpl(split=frequency)", 0.5)
    assert figures.without("ce", "bound") is None
