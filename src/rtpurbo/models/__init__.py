"""The Hugging Face side: dense models in, sparse models out, with the same weights inside."""
