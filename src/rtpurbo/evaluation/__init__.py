"""Evaluation of a sparse model beside the dense one: quality, tokens read, cache size in bytes."""
