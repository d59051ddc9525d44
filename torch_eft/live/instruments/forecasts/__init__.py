"""Parts that lay a forecast beside the measured values."""
