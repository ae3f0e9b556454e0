"""Speed and memory of the operators and of whole models, with dense kernels measured in the same run."""
