"""What a step of an optimizer does to the outputs, and how large it may be."""
