"""Forecasts of a training: one network's from its own derivatives, drawn networks' means, and both beside a run."""
