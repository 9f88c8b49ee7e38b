"""perturbjax: learning with perturbation, in JAX.

Three levels, each usable without the ones above it: functions (pure maths, one per equation), transforms (perturbations of the
loss for `chain` and `objective`, and optax links for gradients and parameters), experiments (scripts with flags).
"""

import typing

# The order is that of the forward and backward pass: input, activation, logit, label, loss, logit gradient, gradient, parameter.
from perturbjax.activation.ada import ada, squared_distance
from perturbjax.activation.dropblock import dropblock, dropblock_gamma, dropblock_kept, dropblock_mask
from perturbjax.activation.dropout import dropout, dropout_mask
from perturbjax.activation.lpa import lpa, norm_expansion
from perturbjax.activation.lpa_amplification import amplification, lipschitz_product, local_amplification
from perturbjax.activation.lpa_rank import low_rank
from perturbjax.activation.lpa_sites import layer_effect
from perturbjax.activation.manifold_mixup import manifold_mixup, softmax_binary_cross_entropy
from perturbjax.activation.r_drop import r_drop, symmetric_divergence
from perturbjax.activation.rsc import rsc, top_share
from perturbjax.activation.spatial_dropout import spatial_dropout
from perturbjax.bound import layer_scaled, varied, varied_by_frequency
from perturbjax.classes import class_count, class_mean, class_sum
from perturbjax.core import Batch, Objective, Output, batch, objective
from perturbjax.feature.adversarial import group_ascent, random_start, shifted
from perturbjax.feature.adversarial_training import adversarial_training
from perturbjax.feature.cuat import cuat
from perturbjax.feature.cutmix import cutmix, cutmix_boxes
from perturbjax.feature.domain_mixup import domain_mixup, ring_partners
from perturbjax.feature.free_at import free_at
from perturbjax.feature.mixed_uat import mixed_uat
from perturbjax.feature.mixup import draw_mixing, mix, mixup
from perturbjax.feature.random_erasing import erasing_box, random_erasing
from perturbjax.feature.regpert import regpert, regularised_delta
from perturbjax.feature.robust_clustering import outlier_vectors, robust_clustering, robust_kmeans
from perturbjax.feature.robust_regression import robust_regression, sparse_shift
from perturbjax.feature.uat import uat
from perturbjax.gradient.clipping import gradient_clipping
from perturbjax.gradient.dp_sgd import dp_sgd
from perturbjax.gradient.graddrop import graddrop, graddrop_gradients, graddrop_mask
from perturbjax.gradient.lpg import lpg, lpg_delta
from perturbjax.gradient.lpg_duality import logit_gradient_of
from perturbjax.gradient.lpg_generalization import lpg_bound_term, lpg_generalization_bound
from perturbjax.gradient.lpg_pgd import lpg_full_delta, lpg_head_delta
from perturbjax.gradient.lpg_updates import lpg_updates
from perturbjax.gradient.noise import gradient_noise
from perturbjax.gradient.normalisation import ngd
from perturbjax.gradient.pcgrad import pcgrad, pcgrad_coefficients, pcgrad_gradients
from perturbjax.gradient.perturb_cotangent import perturb_cotangent
from perturbjax.inference.pgd import Search, pgd
from perturbjax.inference.proximal import proximal_search, proximal_step, soft_threshold
from perturbjax.label.adversarial_label_smoothing import adversarial_label_smoothing, adversarially_smoothed
from perturbjax.label.bootstrapping import bootstrapped_targets, bootstrapping
from perturbjax.label.d2l import d2l, local_dimension
from perturbjax.label.disturb_label import disturb_label, disturbed_targets
from perturbjax.label.dlb import dlb
from perturbjax.label.forward_correction import forward_corrected, forward_correction, noise_matrix
from perturbjax.label.label_smoothing import label_smoothing
from perturbjax.label.mix_bootstrapping import mix_bootstrapped, mix_bootstrapping
from perturbjax.label.online_label_smoothing import online_label_smoothing, smoothed_online
from perturbjax.label.proselflc import proselflc, self_trust
from perturbjax.label.rlr import relaxed_targets, rlr
from perturbjax.label.robust_lasso import corruption, robust_lasso
from perturbjax.line import Line, line
from perturbjax.link import Context, Flow, Perturbation, Rest, ce, chain, per_sample_keys
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
from perturbjax.loss.coral import coral, coral_penalty
from perturbjax.loss.dac import dac, dac_losses
from perturbjax.loss.dann import dann, discriminator_init, domain_losses
from perturbjax.loss.dsl import choose_prototypes, dsl, prototype_labels
from perturbjax.loss.focal import focal, focal_factor, sigmoid_focal_losses
from perturbjax.loss.gce import gce, gce_terms
from perturbjax.loss.kd import distillation_losses, kd
from perturbjax.loss.nu_svm import nu_svm, nu_svm_losses
from perturbjax.loss.poly_loss import poly_loss
from perturbjax.loss.sce import reverse_cross_entropy, sce
from perturbjax.loss.self_paced import loss_quantile, self_paced, self_paced_losses
from perturbjax.loss.svm import margins, slack, svm
from perturbjax.loss.teacher import Teacher, load_teacher
from perturbjax.method import Coordinates, method
from perturbjax.names import near as _near
from perturbjax.optimizer_check import check_optimizer
from perturbjax.parameter.amp import amp, amp_project
from perturbjax.parameter.asam import asam, asam_ascent
from perturbjax.parameter.asking import unmasked
from perturbjax.parameter.esam import esam, esam_ascent, esam_weights
from perturbjax.parameter.gsam import gsam, gsam_ascent, gsam_direction
from perturbjax.parameter.looksam import looksam, looksam_across, looksam_reuse
from perturbjax.parameter.pugd import pugd, pugd_ascent
from perturbjax.parameter.rts import rts, rts_ascent, rts_direction
from perturbjax.parameter.sam import sam, sam_ascent
from perturbjax.parameter.swad import SWADAverage, swad, swad_counts, swad_interval, swad_window
from perturbjax.parameter.timing import after, always, by_rate, cosine, every, last, linear, never, plateau
from perturbjax.projection import project
from perturbjax.split import Split, all_classes, by_accuracy, by_frequency, by_loss, by_loss_top, by_variance

__version__ = "0.1.0"

if not typing.TYPE_CHECKING:  # a type checker would take every name for known

    def __getattr__(name: str):
        """Says what the short name of the command line is called here, and the nearest name to one that isn't there."""
        aliases = {getattr(value, "alias", None): key for key, value in list(globals().items())} | {"erm": "ce"}
        if name in aliases:
            raise AttributeError(f"perturbjax has no {name!r}. Write pj.{aliases[name]}.")
        if not name.startswith("_") and (close := _near(name, [*__all__, *(alias for alias in aliases if alias)], 1, 0.75)):
            meant = aliases.get(close[0], close[0])
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Write pj.{meant}.")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [name for name, value in list(globals().items()) if not name.startswith("_") and type(value).__name__ != "module"]
