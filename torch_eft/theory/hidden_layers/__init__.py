"""Hidden kernels and NTKs, and how training changes them at order 1/n."""
