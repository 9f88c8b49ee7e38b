"""Perturbations of the logits."""
