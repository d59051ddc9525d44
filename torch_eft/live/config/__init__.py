"""What a user sets: presets of parts, probe inputs, schedules."""
