"""Pictures of what an engine did: each takes a trace or plain values and returns something to show."""
