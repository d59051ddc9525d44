"""Runs the user's network: probe inputs, isolated copies, outputs, checks, decompositions."""
