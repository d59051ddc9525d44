"""Single numbers that follow from the statistics at initialization."""
