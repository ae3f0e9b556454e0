"""Numbers as people write them."""


def short_length(tokens: int) -> str:
    """4096 as "4K", 1048576 as "1M"; what is no multiple of 1,024 in full, 7500 as "7,500"."""
    if tokens and tokens % 1024**2 == 0:
        return f"{tokens // 1024**2:,}M"
    return f"{tokens // 1024:,}K" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


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
