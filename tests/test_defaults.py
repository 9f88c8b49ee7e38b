"""No default ruins a plain case: balanced digits, the scripts' own small net and settings, a method as it comes beside plain training."""

import numpy as np
import pytest

from experiments import shared
from perturbjax.training import fit

EPOCHS, PLAIN = 8, 0.95


def accuracy(method, **flags):
    settings = shared.Settings(view="none", epochs=EPOCHS, test_every=EPOCHS, **flags)
    [(made, numbers)] = shared.parse_methods(method).values()
    data = shared.load_view(settings, 0)
    recipe = shared.make_recipe(settings, data, made, shared.channel_stats(settings))
    return float(fit(recipe, data, shared.make_numbers(settings, numbers), 0).accuracy[-1])


@pytest.mark.optax_promotes
@pytest.mark.parametrize(
    "method, before",
    [
        ("ce", None),
        ("rr", "rr(space=logit)"),
        ("rlr", "rlr(weight=1)"),
        ("self_paced_logit(tau=0.5, start=0.2)", None),
        ("zla(share=1)", None),
        pytest.param("rlasso", "rlasso(space=logit)", marks=pytest.mark.slow),
    ],
)
def test_a_method_as_it_comes_learns_what_plain_training_learns(method, before):
    """before: what the default was, which does not."""
    assert accuracy(method) > PLAIN - 0.01
    assert before is None or accuracy(before) < PLAIN - 0.02


@pytest.mark.optax_promotes
def test_zla_on_balanced_data_asks_for_its_classes_before_training():
    settings = shared.Settings(view="none")
    data, methods = shared.load_view(settings, 0), shared.parse_methods("ce, zla")
    assert np.ptp(data.class_counts) < 20
    with pytest.raises(ValueError, match=r"^zla: zla needs to know which classes are unseen, .* Write zla\(unseen=\["):
        shared.check_runs(settings, data, methods)
