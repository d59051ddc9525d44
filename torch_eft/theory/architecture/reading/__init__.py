"""Reads an architecture off a module: its graph of tensor operations, and the law of its weights."""
