"""The trained distribution of an ensemble, at infinite width and to order 1/n."""
