"""experiments/figures.py draws what the other scripts wrote."""

import json

import numpy as np
import pytest

from experiments import figures, train
from perturbjax.analysis.figures import loss_ratios, self_paced_weights


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
    assert figures.without("ce", "bound") is None and figures.without("r_drop(cut=true)", "cut") is None
    assert figures.without("bootstrap(hard)+logpert(weight=0.1)", "weight") == ("bootstrap(hard)+logpert", 0.1)
    typed = "lpl(bound=varied(0.5), step_size=0.1)+r_drop(cut=true)"
    assert figures.without(typed, "step_size") == ("lpl(bound=varied(0.5))+r_drop(cut=true)", 0.1)
    both = "lpl(bound=0.5)+lpa(bound=2)"
    assert figures.without(both, "lpl.bound") == ("lpl+lpa(bound=2)", 0.5)
    assert figures.without(both, "lpa.bound") == ("lpl(bound=0.5)+lpa", 2.0)
    with pytest.raises(ValueError, match="setting of one method, got 'bound' of 2 in .* Write --setting lpl.bound"):
        figures.without(both, "bound")


def test_weights_of_self_paced_learning(tmp_path):
    losses = np.array([0.5, 1.9, 2.1, 3.9])
    weights = self_paced_weights(losses, 2.0, weight=0.175)
    np.testing.assert_array_equal(weights["self-paced, hard"], [1, 1, 0, 0])
    np.testing.assert_allclose(weights["self-paced, linear"], np.maximum(0, 1 - losses / 2), rtol=1e-6)
    assert (weights["self-paced logits"][:2] == 1).all() and (weights["self-paced logits"][2:] < 0.01).all()
    # LogPert lifts the true class's probability to 1 - λ: λ is what is left of the gradient 1 - p = 1 - e^-loss.
    np.testing.assert_allclose(weights["LogPert, λ = 0.175"], np.minimum(1, 0.175 / -np.expm1(-losses)), rtol=1e-5)
    figures.main(["weights", "--out", str(tmp_path / "weights.svg")])
    assert "self-paced, hard" in (tmp_path / "weights.svg").read_text()


@pytest.mark.optax_promotes  # schedules
def test_ratio_of_losses_of_a_run(tmp_path):
    logits, labels = np.array([[3.0, 0.0], [0.0, 3.0], [0.2, 0.0]]), np.array([0, 0, 0])
    losses, ratios = loss_ratios(logits, labels, tau=1.0)
    assert losses[0] < losses[1] < 1 < losses[2] and (ratios[:2] == 1).all() and 0 < ratios[2] < 0.01
    run, out = tmp_path / "run", tmp_path / "ratio.svg"
    train.main(["--view", "thin(10)", "--epochs", "1", "--out", str(run)])
    figures.main(["ratio", "--run", str(run), "--view", "thin(10)", "--out", str(out)])
    assert "loss after" in out.read_text()
    figures.main(["epochs", "--results", str(run / "results.json"), "--out", str(tmp_path / "epochs.svg")])
    assert (tmp_path / "epochs.svg").read_text().startswith("<svg")
