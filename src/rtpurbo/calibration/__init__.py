"""Calibration: documents, scores of query heads, gates, and the choice of retrieval heads."""
