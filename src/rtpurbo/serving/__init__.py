"""Serving of sparse models: exports for engines, the vLLM plugin and server, chat."""
