"""The law of one network's drift, before it is trained."""
