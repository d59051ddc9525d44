"""Reads an ensemble off a module, and statistics over re-initialized networks."""
