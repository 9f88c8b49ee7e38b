"""Perturbations and weightings of the losses."""
