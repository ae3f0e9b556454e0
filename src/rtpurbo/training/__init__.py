"""Stage 1 fits the token indexers to the frozen model; stage 2 heals the sparse model by self-distillation."""
