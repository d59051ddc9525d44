"""Single neurons of a population: their draws, what they contribute to the spread, kernels as averages over them."""
