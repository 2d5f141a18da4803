"""Hugging Face's own forward (M1, M2)."""
