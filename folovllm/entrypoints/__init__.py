"""The ways in: the LLM class and the command line."""
