"""Any architecture of weights, activations, norms, pooling and skips: kernels at infinite width, spread over seeds."""
