"""vLLM writes the responses and a served reward model labels them, for a learner in JAX; talks plain HTTP."""
