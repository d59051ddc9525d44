"""Jacobian factors per layer, and the kernels that they give."""
