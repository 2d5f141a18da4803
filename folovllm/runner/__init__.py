"""From a step's plan to sampled token ids: the part that owns tensors."""
