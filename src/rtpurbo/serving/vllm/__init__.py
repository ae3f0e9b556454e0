"""Sparse models on vLLM: a plugin that vLLM discovers when rtpurbo is installed.

Only `layout` can be imported without vLLM.
"""
