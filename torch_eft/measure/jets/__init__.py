"""Taylor series through a network: one rule per torch operation."""
