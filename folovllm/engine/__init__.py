"""Text in, text out: the step, the detokenizer, the trace and the engine around them."""
