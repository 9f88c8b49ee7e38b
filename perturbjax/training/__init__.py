"""Training: one jitted step for any chain, optimiser and model (`step`), the loop around it (`loop`), what it costs (`cost`).

`devices` spreads the step, `feed` brings its batches, `checkpoint` and `folder` keep what was reached, `diagnose` says what broke.
Knows the objective, optax and the models' form, and no method.
"""

from perturbjax.chains import split_methods
from perturbjax.training.checkpoint import CheckpointNotWritten, Checkpoints, NewerCheckpoint, load_variables
from perturbjax.training.cost import TimedStep, cost_ratios, first_batch
from perturbjax.training.devices import Devices, start_processes
from perturbjax.training.folder import OtherSettings, RunFolder
from perturbjax.training.history import History
from perturbjax.training.interrupt import Interrupted
from perturbjax.training.loop import Options, Run, fit, fit_many, predict
from perturbjax.training.recipes import RECIPES, recipe_flags
from perturbjax.training.schedule import FineTuning, Schedule
from perturbjax.training.step import DeviceData, Recipe, TrainState, device_data, init_state, sample_data

__all__ = [
    "RECIPES", "CheckpointNotWritten", "Checkpoints", "DeviceData", "Devices", "FineTuning", "History", "Interrupted", "NewerCheckpoint", "Options",
    "OtherSettings", "Recipe", "Run", "RunFolder", "Schedule", "TimedStep", "TrainState", "cost_ratios", "device_data", "first_batch",
    "fit", "fit_many", "init_state", "load_variables", "predict", "recipe_flags", "sample_data", "split_methods", "start_processes",
]  # fmt: skip
