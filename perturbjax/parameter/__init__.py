"""Perturbations of the point where the gradient is taken: links of the optimiser that need `grad_fn`."""
