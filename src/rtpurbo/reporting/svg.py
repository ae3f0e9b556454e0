"""Matplotlib's figures as SVG elements for HTML pages, and as image files.

SVG figures take their colours from CSS variables (`rtpurbo.reporting.palette`), so they follow a
light or dark page. The same data gives the same SVG: ids are derived from the content and no date is
written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_file, write_text_atomically
from rtpurbo.reporting.palette import PALETTE, variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOR_NAMES = {values[0]: name for name, values in PALETTE.items()}
_SHAPES = ("circle", "defs", "g", "path", "rect", "text", "title", "use")
"""Elements of matplotlib's SVG that are kept; not metadata, clip paths and a global style."""

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Mark:
    """Tooltip and CSS class of one drawn element."""

    title: str
    class_: str = "mark"


@contextmanager
def figure_style() -> Iterator[Callable[..., Figure]]:
    """Matplotlib's settings for every figure; gives the constructor of figures."""
    import matplotlib
    from matplotlib.figure import Figure

    soft, edge = PALETTE["soft"][0], PALETTE["edge"][0]
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "rtpurbo",
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "axes.titlesize": 12,
        "axes.titlecolor": PALETTE["ink"][0],
        "axes.labelcolor": PALETTE["ink"][0],
        "axes.edgecolor": edge,
        "axes.unicode_minus": False,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.spines.bottom": False,
        "axes.labelpad": 4,
        "grid.color": edge,
        "grid.linewidth": 1,
        "xtick.color": soft,
        "ytick.color": soft,
        "xtick.major.size": 0,
        "xtick.major.pad": 7,
        "ytick.major.pad": 6,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "text.color": PALETTE["ink"][0],
        "lines.dashed_pattern": (3.5, 2),
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        yield Figure


def svg(
    figure: Figure,
    alternative: str,
    marks: Mapping[str, Sequence[Mark]] | None = None,
    class_: str = "plot",
) -> str:
    """Returns a figure as an `<svg>` element for an HTML page.

    Colours of the palette become CSS variables, element ids are unique to the figure, and what only file
    viewers need (sizes, metadata, clip paths) is left out. Nothing in the figure may lie beyond its axes.
    Marks are tooltips and classes of the elements in a group, by the group's matplotlib gid.
    """
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(file.getvalue())
    for group in root.iter(f"{_SVG}g"):
        name = group.get("id", "")
        if marks and name in marks:
            _label(group, marks[name])
        elif name in ("line", "faint", "whisker"):
            for element in group.iter():
                if element.tag in (f"{_SVG}path", f"{_SVG}use"):
                    element.set("class", name)
    referenced = {element.get(_HREF, "").removeprefix("#") for element in root.iter()}
    prefix = f"f{sha256(file.getvalue().encode() + alternative.encode()).hexdigest()[:8]}"
    for element in root.iter():
        _clean(element, referenced, prefix)
    _flatten(root)
    view_box = root.get("viewBox", "")
    root.attrib = {
        "viewBox": view_box,
        "role": "img",
        "aria-label": alternative,
        "class": class_,
    }
    return ElementTree.tostring(root, encoding="unicode").replace("\n", "")


def svg_document(drawing: str, title: str) -> str:
    """Returns an `<svg>` element with the palette inside, for a file of its own."""
    style = (
        f"<style>svg {{ {variables(0)} }} @media (prefers-color-scheme: dark) {{ svg {{ "
        f"{variables(1)} }} }} text {{ font-family: system-ui, -apple-system, 'Segoe UI', Roboto, "
        "sans-serif; }</style>"
    )
    head = f"<title>{title}</title>{style}"
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"^(<svg [^>]*>)", lambda match: match[1] + head, opened, count=1)


def _label(group: ElementTree.Element, marks: Sequence[Mark]) -> None:
    """Adds tooltips to the drawn elements of a group, which are in the order of the data."""
    kinds = (f"{_SVG}use",) if group.find(f".//{_SVG}use") is not None else (f"{_SVG}path",)
    elements = [element for element in group.iter() if element.tag in kinds]
    for element, mark in zip(elements, marks, strict=True):
        element.set("class", mark.class_)
        if mark.title:
            ElementTree.SubElement(element, f"{_SVG}title").text = mark.title


def _clean(element: ElementTree.Element, referenced: set[str], prefix: str) -> None:
    """Removes what a page does not need from an element, and names colours by CSS variables."""
    element.tag = element.tag.removeprefix(_SVG)
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    attributes = {}
    for name, value in element.attrib.items():
        if name == "id":
            if value in referenced:
                attributes["id"] = f"{prefix}-{value}"
        elif name == _HREF:
            attributes["href"] = f"#{prefix}-{value.removeprefix('#')}"
        elif name in ("d", "x", "y", "transform"):
            # To a tenth of a unit; adding 0 turns -0 into 0.
            shortened = re.sub(
                r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), 1) + 0.0:g}", value
            )
            if not shortened.startswith("rotate(-0"):
                attributes[name] = re.sub(r"\s+", " ", shortened).strip()
        elif name == "style":
            value = re.sub(
                r"#[0-9a-f]{6}",
                lambda match: (
                    f"var(--{_COLOR_NAMES[match[0]]})" if match[0] in _COLOR_NAMES else match[0]
                ),
                value,
            )
            # The page sets the family; matplotlib measures with a wider one, so labels fit.
            value = re.sub(r"font-family:[^;]*;?", "", value)
            attributes["style"] = value.replace(": ", ":").replace("; ", ";").strip()
        elif name != "clip-path":
            attributes[name] = value
    element.attrib = attributes


def _flatten(parent: ElementTree.Element) -> None:
    """Replaces groups without attributes by their children, and drops empty elements."""
    children: list[ElementTree.Element] = []
    for child in parent:
        _flatten(child)
        invisible = child.tag == "path" and child.get("style") == "fill:none"
        if child.tag == "g" and not child.attrib:
            children += list(child)
        elif (
            child.tag in _SHAPES
            and not invisible
            and (child.tag not in ("defs", "g") or len(child))
        ):
            children.append(child)
    parent[:] = children


def save_image(figure: Figure, path: str | Path, alternative: str) -> None:
    """Writes a figure in the format of the file's name; SVG follows light and dark settings.

    Raises:
        RTPurboError: matplotlib does not know the format.
    """
    if Path(path).suffix == ".svg":
        write_text_atomically(path, svg_document(svg(figure, alternative), alternative) + "\n")
        return
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=150, metadata={})
    except ValueError as error:
        raise RTPurboError(f"the picture {path} cannot be drawn: {error}.") from error
