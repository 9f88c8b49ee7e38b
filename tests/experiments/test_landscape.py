"""experiments/landscape.py, end to end on the digits: numbers that agree with the nets, pictures, runs of other scripts, bad flags."""

import json

import numpy as np
import pytest

from experiments import landscape, train
from experiments.shared import many

pytestmark = pytest.mark.optax_promotes  # schedules

QUICK = ["--epochs", "3", "--steps", "12", "--points", "5", "--samples", "200"]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    out = tmp_path_factory.mktemp("landscape")
    landscape.main([*QUICK, "--methods", "ce, sam(radius=0.3)", "--seeds", "2", "--plane", "3", "--out", str(out)])
    return out, json.loads((out / "landscape.json").read_text())


def test_it_trains_looks_and_writes(looked):
    out, found = looked
    assert [(net["method"], net["seed"]) for net in found["nets"]] == [
        (m, s) for m in ("ce", "sam(radius=0.3)") for s in (0, 1)
    ]
    for net in found["nets"]:
        assert net["samples"] == 200 and net["accuracy"] > 0.5
        assert net["lambda_max"][0] > 0 and net["lambda_error"][0] < 0.05 * net["lambda_max"][0]
        assert 0 < net["sharpness"] < net["loss"] + 1
        for line in net["lines"].values():
            assert len(line["places"]) == len(line["losses"]) == 5 and line["places"][2] == 0
            assert line["losses"][2] == pytest.approx(net["loss"], rel=1e-5)
        assert np.array(net["plane"]["losses"])[1, 1] == pytest.approx(net["loss"], rel=1e-5)
        along = net["lines"]["gradient"]["losses"]
        assert along[3] > along[2]  # uphill
    for name in ("lines.svg", "plane.svg"):
        assert ">sam(radius=0.3)<" in (out / name).read_text()
    for name in ("lines.png", "plane.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_with_other_flags_it_looks_again_at_the_nets_that_are_there(looked, monkeypatch, capsys):
    out, found = looked
    monkeypatch.setattr(many, "train_group", None)  # nothing is trained
    landscape.main([*QUICK, "--methods", "ce, sam(radius=0.3)", "--seeds", "2", "--radius", "0.1", "--out", str(out)])
    again = json.loads((out / "landscape.json").read_text())
    for before, after in zip(found["nets"], again["nets"], strict=True):
        assert after["loss"] == before["loss"] and after["sharpness"] > before["sharpness"] and "plane" not in after
    assert "λ max" in capsys.readouterr().out


def test_a_method_that_diverges_takes_no_other_down(tmp_path):
    with pytest.raises(FloatingPointError, match="The results are those of the other methods"):
        landscape.main([*QUICK, "--methods", "ce, lpg(split=all, bound=1e30)", "--epochs", "1", "--out", str(tmp_path)])
    assert [net["method"] for net in json.loads((tmp_path / "landscape.json").read_text())["nets"]] == ["ce"]


def test_it_reads_the_runs_of_train_py(tmp_path):
    run = tmp_path / "run"
    train.main(["--method", "ls", "--seed", "4", "--epochs", "2", "--view", "longtail(10)", "--out", str(run)])
    landscape.main([*QUICK, "--runs", str(run), "--part", "test", "--samples", "0", "--out", str(tmp_path / "look")])
    [net] = json.loads((tmp_path / "look" / "landscape.json").read_text())["nets"]
    results = json.loads((run / "results.json").read_text())
    assert (net["method"], net["seed"], net["samples"]) == ("ls", 4, results["data"]["test_size"])
    assert net["accuracy"] == pytest.approx(results["methods"]["ls"]["accuracy"]["mean"])
    kept = json.loads((run / "run.json").read_text())
    kept["settings"]["subset_hash"] = "other"
    (run / "run.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="--runs needs the data that .* was trained on, got 'digits'.*Name it with --data"):
        landscape.main(["--runs", str(run)])


def test_bad_flags_are_named(tmp_path):
    with pytest.raises(ValueError, match="--part needs part to be one of its names, got 'validation'.*There are: test, train"):
        landscape.main(["--part", "validation"])
    with pytest.raises(ValueError, match="--points needs points >= 2, got 1. Write --points 2"):
        landscape.main(["--points", "1"])
    with pytest.raises(ValueError, match="--runs needs folders with finished runs of compare.py or train.py, got"):
        landscape.main(["--runs", str(tmp_path)])
    audited = tmp_path / "audit" / "seed-0"  # as audit.py leaves it: without run.json
    audited.mkdir(parents=True)
    for name in ("model.json", "finished.npz"):
        (audited / name).touch()
    with pytest.raises(ValueError, match="--runs needs .*audit', which has none. Write --runs and the --out of such a command"):
        landscape.main(["--runs", str(tmp_path / "audit")])
