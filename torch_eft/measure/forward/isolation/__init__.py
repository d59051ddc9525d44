"""Evaluates a network on a copy, without a trace in its training and independently of the training's settings."""

from torch_eft.measure.forward.isolation.network import (
    IsolatedModel,
    Isolation,
    Model,
    Parameters,
    check_parameters,
    isolated,
)

__all__ = ["IsolatedModel", "Isolation", "Model", "Parameters", "check_parameters", "isolated"]
