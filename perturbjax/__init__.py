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
from perturbjax.inference.proximal import proximal_search, proximal_step, soft_threshold
from perturbjax.label.adversarial_label_smoothing import adversarial_label_smoothing, adversarially_smoothed
from perturbjax.label.bootstrapping import bootstrapped_targets, bootstrapping
from perturbjax.label.d2l import d2l, local_dimension
from perturbjax.label.disturb_label import disturb_label, disturbed_targets
from perturbjax.label.dlb import distillation, dlb
from perturbjax.label.forward_correction import forward_corrected, forward_correction, noise_matrix
from perturbjax.label.label_smoothing import label_smoothing
from perturbjax.label.mix_bootstrapping import mix_bootstrapped, mix_bootstrapping
from perturbjax.label.online_label_smoothing import online_label_smoothing, smoothed_online
from perturbjax.label.proselflc import proselflc, self_trust
from perturbjax.label.rlr import relaxed_targets, rlr
from perturbjax.label.robust_lasso import corruption, robust_lasso
from perturbjax.line import Line, line
from perturbjax.logit.adaptive_margin import adaptive_margin, adaptive_margin_step
from perturbjax.logit.arcface import arcface, arcface_delta
from perturbjax.logit.cosface import cosface, cosface_delta
from perturbjax.logit.isda import isda, isda_delta
from perturbjax.logit.large_margin import angle_margin, large_margin, large_margin_shift
from perturbjax.logit.ldam import deferred_weights, ldam, ldam_margins
from perturbjax.logit.logit_adjustment import balanced_softmax, logit_adjustment, logit_adjustment_delta
from perturbjax.logit.logpert import logpert, logpert_delta, perturbation_sizes
from perturbjax.logit.lpl import lpl, lpl_delta, lpl_steps
from perturbjax.logit.lpl_steps import head_tail_steps, proportional_steps
from perturbjax.logit.mbls import margin_excess, mbls
from perturbjax.logit.mixpert import hard_samples, mixpert, mixpert_delta
from perturbjax.logit.self_paced_logit import self_paced_logit, self_paced_logit_delta
from perturbjax.logit.zla import zla, zla_delta
from perturbjax.loss.akd import akd
from perturbjax.loss.balanced_fine_tuning import balanced_fine_tuning
from perturbjax.loss.center_loss import center_loss, center_penalty, moved_centers
from perturbjax.loss.class_weighting import class_weighting, class_weights
from perturbjax.loss.confidence_penalty import confidence_penalty, entropy
from perturbjax.loss.dac import dac, dac_losses
from perturbjax.loss.dsl import choose_prototypes, dsl, prototype_labels
from perturbjax.loss.focal import focal, focal_factor
from perturbjax.loss.gce import gce, gce_terms
from perturbjax.loss.kd import distillation_losses, kd
from perturbjax.loss.nu_svm import nu_svm, nu_svm_losses
from perturbjax.loss.poly_loss import poly_loss
from perturbjax.loss.sce import reverse_cross_entropy, sce
from perturbjax.loss.self_paced import loss_quantile, self_paced, self_paced_losses
from perturbjax.loss.svm import margins, slack, svm
from perturbjax.loss.teacher import Teacher, load_teacher
from perturbjax.parameter.pugd import pugd, pugd_ascent
from perturbjax.parameter.sam import sam, sam_ascent
from perturbjax.projection import project
from perturbjax.split import Split, all_classes, by_accuracy, by_frequency, by_loss, by_loss_top, by_variance

__version__ = "0.1.0"
__all__ = [name for name, value in list(globals().items()) if not name.startswith("_") and type(value).__name__ != "module"]
