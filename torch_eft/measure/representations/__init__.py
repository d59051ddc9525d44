"""Hidden kernels and how they change."""
