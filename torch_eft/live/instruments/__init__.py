"""The parts of an observer, one concern each."""
