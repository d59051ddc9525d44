"""Taylor series in theta - theta_0, and the models trained on them."""
