"""Texts, made-up needles to hide in them, and the examples built from both."""
