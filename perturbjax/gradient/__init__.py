"""Perturbations of logit gradients (links of the loss) and of parameter gradients (links of the optimiser)."""
