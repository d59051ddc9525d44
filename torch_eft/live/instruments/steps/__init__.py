"""What the step that follows a measurement does: known when its gradient is."""
