"""How long computations say how far they are."""
