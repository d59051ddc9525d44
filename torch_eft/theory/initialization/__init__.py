"""Statistics at initialization: kernels at infinite width and the vertices of order 1/n."""
