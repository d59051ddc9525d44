"""One network under measurement: snapshots, also shared between ranks."""
