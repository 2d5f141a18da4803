"""folovllm teaches how a modern LLM inference engine works by being one."""

__version__ = "0.1.0"
