"""Algorithms that chapters need and the engine does not."""
