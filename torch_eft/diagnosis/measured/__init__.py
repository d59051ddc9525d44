"""The diagnosis of any other network, measured."""
