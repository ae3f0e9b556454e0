"""Experiments that settle open questions of the conversion; run by `experiments/ablate.py`."""
