"""Vertices of order 1/n and training of convolutional networks that are chains of layers."""
