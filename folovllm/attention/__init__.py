"""Attention over K/V in blocks: the layout of a step (metadata), and the backends that compute it."""
