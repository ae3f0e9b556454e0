"""Stage 1 trains the token indexers on the frozen model; stage 2 adapts the sparse model by self-distillation."""
