"""The command line: ``torch-eft demo | diagnose | report``."""
