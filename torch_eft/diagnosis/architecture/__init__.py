"""The diagnosis of convolutions, skips and norms, derived from the graph of their layers."""
