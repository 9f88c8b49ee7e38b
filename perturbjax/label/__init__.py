"""Perturbations of the targets."""
