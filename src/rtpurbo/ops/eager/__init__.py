"""The specification: what every operator means, in plain PyTorch, in chunks of queries."""
