"""Bridge to LM Evaluation Harness (lm-eval): its tasks, prompts and metrics, our models."""
