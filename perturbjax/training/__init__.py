"""Training: one jitted step for any chain, optimiser and model (`step`), the loop around it (`loop`), what it costs (`cost`).

Knows the objective, optax and the models' form, and no method.
"""

from perturbjax.training.cost import cost_ratios
from perturbjax.training.loop import History, fit
from perturbjax.training.step import DeviceData, Recipe, TrainState, device_data, init_state, split_methods

__all__ = [
    "DeviceData", "History", "Recipe", "TrainState", "cost_ratios", "device_data", "fit", "init_state", "split_methods",
]  # fmt: skip
