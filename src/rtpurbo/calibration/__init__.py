"""Finding the retrieval heads: needle documents, a score for each query head, and the choice."""
