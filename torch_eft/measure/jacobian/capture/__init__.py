"""Records what a network does with its parameters: the inputs and outputs of every layer, in one forward.

A ``TorchFunctionMode`` replaces each parameter, where it recognizes what is done with it, by a copy of its value, and
keeps the operation's input and the place of its output in the autograd graph. What still leads from the output to a
parameter afterwards is a use that was not recognized: nothing can be dropped silently.

The same rules serve plain tensors and jets along theta + s v (``jets.py``): there inputs and outputs are series.
"""

from torch_eft.measure.jacobian.capture import rules  # noqa: F401  (registers them)
from torch_eft.measure.jacobian.capture.recorder import RULES, Capture, LayerCall, unrecognized

__all__ = ["RULES", "Capture", "LayerCall", "unrecognized"]
