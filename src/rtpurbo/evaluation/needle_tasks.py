"""The needle tasks by name; apart from their evaluation, which needs torch."""

TASKS = {
    "single": {"num_keys": 1, "num_values": 1},
    "multikey": {"num_keys": 4, "num_values": 1},
    "multivalue": {"num_keys": 1, "num_values": 4},
}
"""What each task hides, as `make_retrieval_example` takes it."""
