"""Expectations of activations under N(0, K)."""
