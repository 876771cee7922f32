"""Prompts: where they come from, how they are split, rendered and batched."""
