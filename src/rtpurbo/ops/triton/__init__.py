"""The Triton backend: the operators as GPU kernels, which also run in Triton's interpreter."""
