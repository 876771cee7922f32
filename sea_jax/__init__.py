"""Sample-efficient alignment of language models in JAX."""
