"""Corrections of order 1/n to the trained mean, covariance and NTK."""
