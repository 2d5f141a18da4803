"""KV memory: what a token costs, who holds which part of it, and where the tensors lie."""
