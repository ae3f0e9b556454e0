"""Formats of numbers and names for tables and figures."""

_TITLES = {
    "ruler": "RULER",
    "babilong": "BABILong",
    "gsm8k": "GSM8K",
    "math": "MATH",
    "mmlu_pro": "MMLU-Pro",
    "humaneval": "HumanEval",
}


def suite_title(suite: str) -> str:
    """Returns the name of a suite as its authors write it."""
    return _TITLES.get(suite, suite)


def suite_at(suite: str, context_length: int) -> str:
    """Returns the title of a suite with its length, unless questions have their own."""
    title = suite_title(suite)
    return f"{title} {short_length(context_length)}" if context_length else title


def short_length(tokens: int) -> str:
    """Formats 4096 as "4K" and 1048576 as "1M"; other numbers than multiples of 1,024 as 7500 as "7,500"."""
    if tokens and tokens % 1024**2 == 0:
        return f"{tokens // 1024**2:,}M"
    return f"{tokens // 1024:,}K" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def short_bytes(count: float) -> str:
    """Formats bytes with a binary unit, such as "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def percent(share: float) -> str:
    """Formats 0.153 as "15.3 %"."""
    return f"{100 * share:.1f} %"
