"""Algorithms that the chapters teach and the engine does not use."""
