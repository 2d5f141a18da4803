"""Attention over K/V in blocks: what it is told (metadata), and who computes it (backends)."""
