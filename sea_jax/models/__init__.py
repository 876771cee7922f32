"""Decoders and encoders as pure functions over plain pytrees, and their Hugging Face loading."""
