"""A decoding step of a whole layer; `attention` is the door."""
