"""experiments/sweep.py: settings one at a time or crossed, one compiled step for all numbers."""

import json

import pytest

from experiments import compare, sweep

pytestmark = pytest.mark.optax_promotes  # schedules

QUICK = ["--view", "thin(8)", "--epochs", "1", "--batch-size", "16", "--seeds", "1"]


def expanded(**settings):
    return sweep.expand(sweep.SweepSettings(**settings))


def test_settings_vary_one_at_a_time_or_all_together():
    text, names = expanded(method="lpg(split=frequency, bound=0.3)", over="bound=0, 0.1; tau=2, median")
    assert names == ["bound", "tau"]
    assert text == [
        "lpg(bound=0, split=frequency)",
        "lpg(bound=0.1, split=frequency)",
        "lpg(bound=0.3, split=frequency, tau=2)",
        "lpg(bound=0.3, split=frequency, tau=median)",
    ]
    crossed, _ = expanded(method="la+lpl", over="lpl.bound=0.1, 0.2; la.tau=1, 2", cross=True)
    assert expanded(method="la+lpl", over="bound=0.1, 0.2")[1] == ["bound"]
    assert expanded(method="lpa+lpl", over="lpl.bound=1, 2; lpa.bound=1, 2")[1] == ["lpl.bound", "lpa.bound"]
    assert crossed == [f"la(tau={tau})+lpl(bound={bound})" for bound in (0.1, 0.2) for tau in (1, 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(over="bound"), "SETTING=VALUE"),
        (dict(over=" "), "at least one setting"),
        (dict(over="bonud=1"), r"'bonud' of 0. There are lpg.bound"),
        (dict(method="la+lpl", over="tau=1"), "'tau' of 2"),
        (dict(method="la, lpl"), "one method, got 2"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        expanded(**settings)


def test_a_sweep_needs_a_seed(tmp_path):
    with pytest.raises(ValueError, match="--seeds needs seeds >= 1, got 0. Write --seeds 1"):
        sweep.main(["--seeds", "0", "--out", str(tmp_path)])


def test_a_sweep_over_numbers_compiles_once_and_gives_compares_numbers(tmp_path, capsys):
    sweep.main(["--method", "lpl(split=frequency)", "--over", "bound=0, 0.25, 0.5", *QUICK, "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert "4 settings x 1 seeds, 2 compiled steps" in said  # plain training, and the sweep
    found = json.loads((tmp_path / "a" / "results.json").read_text())["methods"]
    compare.main(
        ["--methods", "ce, lpl(split=frequency, bound=0.5)", "--cost-rounds", "0", *QUICK, "--out", str(tmp_path / "b")]
    )
    beside = json.loads((tmp_path / "b" / "results.json").read_text())["methods"]
    for typed, entry in beside.items():
        assert found[typed]["accuracy"] == entry["accuracy"]
    assert found["lpl(split=frequency, bound=0)"]["accuracy"] == found["ce"]["accuracy"]
    assert (tmp_path / "a" / "bound.svg").read_text().startswith("<svg")
    sweep.main(["--method", "lpl(split=frequency)", "--over", "bound=0.5, 1", *QUICK, "--out", str(tmp_path / "a")])
    again = json.loads((tmp_path / "a" / "results.json").read_text())["methods"]  # one value more, in the same folder
    assert list(again) == ["ce", "lpl(split=frequency, bound=0.5)", "lpl(split=frequency, bound=1)"]
    assert again["ce"] == found["ce"]


def test_words_make_no_figure_and_settings_of_one_name_one_each(tmp_path, capsys):
    """Everything that was trained is written and shown."""
    over = "lpl.bound=0.1, 0.2; lpa.bound=0.1, 0.3; lpl.split=accuracy, frequency"
    sweep.main(["--method", "lpl+lpa", "--over", over, *QUICK, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "table.md, lpl.bound.svg, lpa.bound.svg to" in said and "lpl(split=frequency)" in said.replace("\n", "")
    assert sorted(file.name for file in tmp_path.glob("*.svg")) == ["lpa.bound.svg", "lpl.bound.svg"]
    lpl, lpa = ((tmp_path / f"{name}.bound.svg").read_text() for name in ("lpl", "lpa"))
    assert ">lpl.bound<" in lpl and ">lpa.bound<" in lpa and lpl != lpa
