"""Speed and memory of the operators and of whole models, beside their peers in the same run."""
