"""The diagnosis of an MLP, derived from its architecture."""
