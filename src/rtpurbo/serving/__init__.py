"""Hands a sparse model over to engines that serve it."""
