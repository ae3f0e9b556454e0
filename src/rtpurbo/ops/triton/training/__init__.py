"""Kernels that training needs: the loss of stage 1 with its gradients."""
