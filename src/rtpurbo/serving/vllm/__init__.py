"""Sparse models on vLLM: a plugin that vLLM finds by itself once rtpurbo is installed beside it.

`layout` alone can be imported where there is no vLLM.
"""
