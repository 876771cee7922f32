"""Configurations: each file has a get_config() and starts with its command."""
