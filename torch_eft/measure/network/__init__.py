"""One network under measurement: bound once, measured as often as wanted; snapshots, also shared between ranks."""
