"""What is beside the engine's own path."""
