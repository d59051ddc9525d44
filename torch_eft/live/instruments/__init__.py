"""The instruments of an observer, one concern each."""
