"""One neuron of a layer on several inputs at once, whatever the law of weights and biases: its moments."""
