"""The live comparison without a trainer: an observer, the parts it is made of, and the sinks it writes to."""
