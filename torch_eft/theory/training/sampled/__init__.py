"""Corrections of order 1/n for any loss, from draws of the initial outputs."""
