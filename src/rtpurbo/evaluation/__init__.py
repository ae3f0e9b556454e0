"""Evaluation of a sparse model against the dense one: quality, tokens read, cache size in bytes."""
