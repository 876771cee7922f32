"""Who labels, and the one way from a duel to its label."""
