"""What a sparse model keeps of the dense one, what it reads and what its cache weighs."""
