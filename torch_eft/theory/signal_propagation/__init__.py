"""Susceptibilities, critical points and regimes."""
