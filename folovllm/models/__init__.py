"""Models: where a name leads to files, and how the files become tensors."""
