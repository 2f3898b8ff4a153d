"""Training of ARM and of the embedded model."""
