"""The specification: what every operator means, in plain PyTorch, with memory bounded by chunks of queries."""
