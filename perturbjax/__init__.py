"""perturbjax: learning with perturbation, in JAX.

Three levels, each usable without the ones above it: functions (pure maths, one per equation), transforms (perturbations of the
loss for `chain` and `objective`, and optax links for gradients and parameters), experiments (scripts with flags).
"""

# The order is that of the forward and backward pass: input, activation, logit, label, loss, logit gradient, gradient, parameter.
from perturbjax.activation.dropout import dropout, dropout_mask
from perturbjax.activation.lpa import lpa
from perturbjax.activation.manifold_mixup import manifold_mixup
from perturbjax.bound import layer_scaled, varied, varied_by_frequency
from perturbjax.classes import class_count, class_mean, class_sum
from perturbjax.core import (
    Batch,
    Context,
    Coordinates,
    Flow,
    Objective,
    Output,
    Perturbation,
    Rest,
    batch,
    ce,
    chain,
    method,
    objective,
    per_sample_keys,
)
from perturbjax.feature.adversarial_training import adversarial_training, random_start
from perturbjax.feature.mixup import draw_mixing, mix, mixup
from perturbjax.gradient.clipping import gradient_clipping
from perturbjax.gradient.lpg import lpg, lpg_delta
from perturbjax.gradient.noise import gradient_noise
from perturbjax.inference.pgd import Search, pgd
from perturbjax.label.bootstrapping import bootstrapped_targets, bootstrapping
from perturbjax.label.label_smoothing import label_smoothing
from perturbjax.line import Line, line
from perturbjax.logit.isda import isda, isda_delta
from perturbjax.logit.logit_adjustment import logit_adjustment, logit_adjustment_delta
from perturbjax.logit.lpl import lpl, lpl_delta, lpl_steps
from perturbjax.loss.class_weighting import class_weighting, class_weights
from perturbjax.loss.focal import focal, focal_factor
from perturbjax.parameter.pugd import pugd, pugd_ascent
from perturbjax.parameter.sam import sam, sam_ascent
from perturbjax.projection import project
from perturbjax.split import Split, all_classes, by_accuracy, by_frequency, by_loss, by_loss_top, by_variance

__version__ = "0.1.0"
__all__ = [name for name, value in list(globals().items()) if not name.startswith("_") and type(value).__name__ != "module"]
