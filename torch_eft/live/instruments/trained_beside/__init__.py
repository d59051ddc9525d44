"""Networks that are trained beside the network: its Taylor models, and other draws of its architecture."""
