"""The NTK and its differentials dNTK and ddNTK."""
