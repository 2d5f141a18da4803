"""What teaches the engine: figures, labs' helpers, benchmarks, graders. The engine does not import it."""
