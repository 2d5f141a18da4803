"""The interfaces: the LLM class and the command line."""
