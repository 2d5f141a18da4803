"""Runs a step's plan: owns the tensors, and returns sampled token ids."""
