"""How the user's network is run: probe inputs, isolated copies, outputs, checks, decompositions."""
