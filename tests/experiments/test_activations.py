"""experiments/figures.py activations: trains on both views, and draws a row for each method."""

import pytest

from experiments import figures

pytestmark = pytest.mark.optax_promotes  # schedules


def test_the_figure_of_activations_by_class(tmp_path):
    out = tmp_path / "activations.svg"
    flags = ["--methods", "dropout(site=stage1), lpa(site=stage1)", "--site", "stage1", "--epochs", "1", "--batches", "2"]
    figures.main(["activations", *flags, "--views", "none", "longtail(10)", "--out", str(out)])
    svg = out.read_text()
    wanted = ("dropout(site=stage1)", "lpa(site=stage1)", "balanced", "longtail(10)")
    assert svg.startswith("<svg") and all(f">{text}<" in svg for text in wanted)
    assert "activation grows" in svg and "gradient" not in svg
