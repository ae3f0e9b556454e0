"""Settings, commands, devices and versions behind a report."""

from __future__ import annotations

import json
from typing import Any

from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.view import Block, Code, Facts, Folded, Items, Section
from rtpurbo.reporting.model_card import artifact_facts

# In this order, under these names; any other entry of a file follows under its own name.
_NAMES = {
    "model": "Model",
    "command": "Command",
    "date": "Date",
    "device": "Device",
    "dtype": "Data type",
    "library_version": "rtpurbo",
    "commit": "Commit",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "format_version": "Format of the file",
    "kv_bytes_at": "Cache size at (tokens)",
    "ruler_words": "Words of RULER",
}


def origin_section(sources: Sources) -> Section:
    """Returns a table for the artifact and one for each file."""
    blocks: list[Block] = []
    if sources.artifact is not None:
        blocks.append(Facts("The artifact", artifact_facts(sources.artifact)))
        settings = json.dumps(sources.artifact.settings, indent=2, ensure_ascii=False)
        blocks.append(Folded("All settings of the conversion", Code(settings)))
    for origin in sources.origins:
        rows = [
            (_NAMES.get(name, name.replace("_", " ")), _text(origin.facts[name]))
            for name in (*_NAMES, *(name for name in origin.facts if name not in _NAMES))
            if origin.facts.get(name) is not None
        ]
        blocks.append(Facts(origin.file, rows, ("Command", "Commit")))
    if sources.remarks:
        blocks.append(Items(sources.remarks))
    return Section("origin", "Settings and provenance", blocks)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
