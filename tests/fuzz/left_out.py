"""What random compositions leave out for now, as it is known to fail, and why; blocks can be asked about alone.

To be emptied as the faults are repaired, and then deleted.
"""

ALIASED = "the copy calls the original's weights"
WRITES = "parameters are written in the forward"
ROUNDED = "the rounding of other dtypes inside is taken for a fault"
CUT = "derivatives of a stopped gradient are called valid"
SECOND = "products with H need second derivatives of operations that have none"
BLOCKS_LEFT_OUT = {
    **dict.fromkeys(["weights in a list", "weights in a tuple", "weights in a dict", "layers in a list"], ALIASED),
    **dict.fromkeys(["weights in a closure", "patched forward", "adapted by a hook"], ALIASED),
    "watched by a hook": "hooks that keep state outside run",
    **dict.fromkeys(["embedding of bounded norm", "bag of bounded norm", "clamped weights"], WRITES),
    **dict.fromkeys(
        ["checkpointed", "checkpointed closure", "checkpointed sequence"],
        "checkpoints run again with the module's own parameters",
    ),
    **dict.fromkeys(["bfloat16 activation", "half activation"], ROUNDED),
    **dict.fromkeys(["float32 layer", "autocast inside"], ROUNDED),
    **dict.fromkeys(["detached backward", "reversed gradient", "gradient doubled by a hook", "detached gate"], CUT),
    **dict.fromkeys(["gate without gradient", "straight-through rounding", "straight-through sign"], CUT),
    **dict.fromkeys(["detached norm", "detached weights", "nearest code", "embedding with padding"], CUT),
    **dict.fromkeys(["once differentiable", "Hardsigmoid", "sum of a bag", "mean of a bag"], SECOND),
    "sparse embedding": "sparse gradients raise torch's own errors",
    "cumulative logsumexp": "its second derivative is NaN in torch",
    "Fourier transform": "kinks are looked for in complex numbers",
    **dict.fromkeys(["temperature", "scalar and shift"], "parameters without axes"),
    "dispatched experts": "routes that single samples do not take",
    "solved": "a product by torch.linalg.solve is taken for another",
    "energy": "a gradient inside is not differentiated again",
    "counting": "buffers are written and put back",
    "scripted": "hooks cannot be set on scripted modules",
    "logit": "derivatives that vanish identically are refused",
}
FORMS_LEFT_OUT = {
    "none": "other arguments than tensors are mapped over",
    "settings": "other arguments than tensors are mapped over",
    "nested": "other arguments than tensors are mapped over",
    "task": "parameters of later samples are dropped",
}
QUESTIONS_LEFT_OUT: dict[str, str] = {}
ENVIRONMENTS_LEFT_OUT = {"parametrize.cached": "the cache holds the original's weights"}
