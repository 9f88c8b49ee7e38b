"""experiments/figures.py gradients: trains on both views, and draws a row for each method."""

import pytest

from experiments import figures

pytestmark = pytest.mark.optax_promotes  # schedules


def test_the_figure_of_gradients_by_class(tmp_path):
    out = tmp_path / "gradients.svg"
    flags = ["--methods", "sam, clip(bound=0.5), lpg", "--epochs", "1", "--batches", "3", "--views", "none", "longtail(10)"]
    figures.main(["gradients", *flags, "--out", str(out)])
    svg = out.read_text()
    assert svg.startswith("<svg") and all(
        f">{text}<" in svg for text in ("sam", "clip(bound=0.5)", "lpg", "balanced", "longtail(10)")
    )
    with pytest.raises(ValueError, match="sma"):
        figures.main(["gradients", "--methods", "sma"])
