"""The recursions of the statistics of order 1/n from layer to layer, and of the dNTK's covariance."""
