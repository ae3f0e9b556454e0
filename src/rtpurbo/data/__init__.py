"""Training and evaluation texts, synthetic tasks, and their registry."""
