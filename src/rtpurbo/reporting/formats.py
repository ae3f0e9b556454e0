"""Numbers as people write them."""


def short_length(tokens: int) -> str:
    """4096 as "4K", 1536 as "1.5K", 500 as "500"."""
    return f"{tokens / 1024:.3g}K" if tokens >= 1024 else str(tokens)


def short_bytes(count: float) -> str:
    """Bytes with a binary unit, such as "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def percent(share: float) -> str:
    """0.153 as "15.3 %"."""
    return f"{100 * share:.1f} %"
