"""What follows for trained outputs: their fourth cumulant at order 1/n, and regression with the kernels."""
