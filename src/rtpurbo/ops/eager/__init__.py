"""Specification of the operators: plain PyTorch, in chunks of queries."""
