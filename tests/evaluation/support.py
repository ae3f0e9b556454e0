"""Shared by tests of results and of resumption."""


def conditions(**changes):
    """Made-up ones."""
    given = {
        "artifact": "a1", "prose": "b2", "words": "rtpurbo", "single_hop": "c3", "two_hop": "d4",
        "task_data": {"aime24": "e5"}, "max_new_tokens": None, "seed": 0, "cache_length": None,
        "dtype": "float32", "device": "cpu", "rtpurbo": "0.1.0", "torch": "2.11.0",
        "transformers": "5.17.0", "lm_eval": None,
    }  # fmt: skip
    return given | changes
