"""Settings of a user: presets of instruments, probe inputs, schedules."""
