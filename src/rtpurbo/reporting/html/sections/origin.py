"""How everything was made: settings, commands, devices, versions."""

from __future__ import annotations

import json
from typing import Any

from rtpurbo.reporting.facts import artifact_facts
from rtpurbo.reporting.html.markup import Content, join, tag
from rtpurbo.reporting.html.sections.section import Section
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.tables import facts, folded

# In this order, under these names; whatever else a file says follows under its own.
_NAMES = {
    "model": "Model",
    "command": "Command",
    "date": "Date",
    "device": "Device",
    "library_version": "rtpurbo",
    "commit": "Commit",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "format_version": "Format of the file",
    "kv_bytes_at": "Caches weighed at (tokens)",
    "ruler_words": "Words of RULER",
}


def origin_section(sources: Sources) -> Section:
    """A table for the artifact and one for each file."""
    parts: list[Content] = []
    if sources.artifact is not None:
        parts.append(facts("The artifact", artifact_facts(sources.artifact)))
        settings = json.dumps(sources.artifact.settings, indent=2, ensure_ascii=False)
        parts.append(folded("Every setting of the conversion", tag("pre", settings)))
    for origin in sources.origins:
        rows = [
            (_NAMES.get(name, name.replace("_", " ")), _value(name, origin.facts[name]))
            for name in (*_NAMES, *(name for name in origin.facts if name not in _NAMES))
            if origin.facts.get(name) is not None
        ]
        parts.append(facts(origin.file, rows))
    if sources.remarks:
        parts.append(tag("ul", [tag("li", remark) for remark in sources.remarks]))
    return Section("origin", "How it was made", join(parts))


def _value(name: str, value: Any) -> Content:
    if name in ("command", "commit"):
        return tag("code", str(value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
