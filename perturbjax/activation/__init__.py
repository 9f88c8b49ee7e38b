"""Perturbations of hidden activations."""
