"""The servers' side, in an environment of their own."""
