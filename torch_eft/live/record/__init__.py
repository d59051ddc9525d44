"""Records what is measured and passes it on to files and loggers."""
