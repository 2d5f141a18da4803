"""Any other Hugging Face decoder, with its attention in blocks."""
