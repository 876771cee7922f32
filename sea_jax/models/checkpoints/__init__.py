"""Weights and configurations as files hold them, read strictly and written back."""
