"""experiments/explain.py, end to end on the digits: pictures and numbers of trained nets, runs side by side, bad flags."""

import json

import pytest

from experiments import explain, train
from experiments.shared import many

pytestmark = pytest.mark.optax_promotes  # schedules

LOOK = ["--samples", "60", "--images", "3"]
TRAIN = ["--model", "cnn", "--width", "4", "--epochs", "1", "--view", "longtail(10)"]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    out = tmp_path_factory.mktemp("explain")
    explain.main([*LOOK, *TRAIN, "--methods", "ce, la", "--out", str(out)])
    return out, json.loads((out / "explain.json").read_text())


def test_it_trains_looks_and_writes(looked):
    out, found = looked
    assert [(net["method"], net["seed"]) for net in found["nets"]] == [("ce", 0), ("la", 0)] and found["samples"] == 60
    for net in found["nets"]:
        for numbers, low in ((net["accuracy"], 0), (net["silhouette"], -1)):
            assert list(numbers) == ["all", "head", "medium", "tail"]
            assert all(low <= number <= 1 for number in numbers.values())
    for name in ("tsne", "cam"):
        assert ">la<" in (out / f"{name}.svg").read_text()
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ">tail<" in (out / "tsne.svg").read_text() and "(tail)" in (out / "cam.svg").read_text()


def test_it_reads_finished_runs_and_needs_the_same_test_samples(looked, tmp_path, monkeypatch, capsys):
    out, found = looked
    monkeypatch.setattr(many, "train_group", None)  # nothing is trained
    explain.main([*LOOK, "--runs", str(out), "--out", str(tmp_path / "a"), "--explain", "prediction", "--site", "stem"])
    again = json.loads((tmp_path / "a" / "explain.json").read_text())
    assert again["nets"] == found["nets"] and (tmp_path / "a" / "cam.svg").exists()
    other = tmp_path / "other"
    train.main(["--model", "mlp", "--epochs", "1", "--view", "thin(20)", "--out", str(other)])
    capsys.readouterr()
    explain.main([*LOOK, "--runs", str(other), "--out", str(tmp_path / "b")])  # balanced, and without maps
    said = " ".join(capsys.readouterr().out.split())
    assert "note: no Grad-CAM: MLP has values (1, 64) at stage2" in said and "cam.svg" not in said
    [net] = json.loads((tmp_path / "b" / "explain.json").read_text())["nets"]
    assert list(net["accuracy"]) == ["all"] and not (tmp_path / "b" / "cam.svg").exists()
    results = json.loads((other / "results.json").read_text())
    assert net["accuracy"]["all"] == pytest.approx(next(iter(results["methods"].values()))["accuracy"]["mean"])


def test_nets_of_other_test_samples_cannot_stand_side_by_side(looked):
    nets = [
        explain.landscape.read(f, explain.ExplainSettings(), named=False)
        for f in explain.landscape.finished_runs([str(looked[0])])
    ]
    changed = explain.dataclasses.replace(nets[1].dataset, test_labels=nets[1].dataset.test_labels[::-1])
    with pytest.raises(ValueError, match="explain.py needs runs with the same test samples, got others in"):
        explain.check_together([nets[0], explain.dataclasses.replace(nets[1], dataset=changed)])


def test_an_unknown_site_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match="'stag2'.*stage2"):
        explain.main([*TRAIN, "--site", "stag2", "--out", str(tmp_path)])
    assert not (tmp_path / "runs").exists()


def test_bad_flags_are_named():
    with pytest.raises(
        ValueError, match="--explain needs explain to be one of its names, got 'both'.*There are: label, prediction"
    ):
        explain.main(["--explain", "both"])
    with pytest.raises(ValueError, match="--images needs images >= 0, got -1. Write --images 0"):
        explain.main(["--images", "-1"])
    with pytest.raises(ValueError, match="--perplexity needs perplexity > 0, got 0.0. Write --perplexity 1"):
        explain.main(["--perplexity", "0"])
