"""One training under observation: the measured network, when it is measured, and its reference point theta_0."""
