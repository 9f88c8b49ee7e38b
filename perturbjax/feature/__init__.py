"""Perturbations of the input, or of an activation treated as one."""
