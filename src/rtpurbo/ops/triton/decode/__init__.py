"""Decode step of a layer: one query token per sequence; the entry point is `attention`."""
