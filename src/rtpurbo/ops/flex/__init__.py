"""The operators by PyTorch's FlexAttention: a whole prompt, with gradients, in memory that grows with its length."""
