"""Write the files that are committed: JSON with a run per line, SVG with an element per line."""

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lars_keras.files import atomic_write_text
from lars_keras.report.charts import svg_style

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONT = re.compile(r"\s*font-family:[^;]*;?")
STYLE = "text{font-family:'DejaVu Sans',Verdana,Arial,sans-serif}*{stroke-linejoin:round}"


def write_json(path: Path, value: Any, width: int = 500) -> None:
    """Write JSON for people who read its diff: one line for each part that fits in `width` characters.

    Args:
        path: the file, in an existing folder.
        value: made of dicts with string keys, lists, strings, numbers, booleans and None.
        width: longest line of a dict or list that is not cut further, its indentation not counted.

    Raises:
        OSError: if the file cannot be written.
    """
    atomic_write_text(path, _json_lines(value, width, "") + "\n")


def _json_lines(value: Any, width: int, indent: str) -> str:
    line = json.dumps(value)
    if len(line) <= width or not isinstance(value, (dict, list)):
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_json_lines(item, width, inner)}" for key, item in value.items()]
    else:
        parts = [_json_lines(item, width, inner) for item in value]
    brackets = "{}" if isinstance(value, dict) else "[]"
    return brackets[0] + "\n" + ",\n".join(inner + part for part in parts) + "\n" + indent + brackets[1]


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as a picture of its own, on white, the same bytes each time.

    Args:
        figure: drawn under `svg_style`.
        path: the file, in an existing folder.

    Raises:
        OSError: if the file cannot be written.
    """
    figure.set_facecolor("white")
    out = io.StringIO()
    with svg_style():
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    atomic_write_text(path, compact(out.getvalue()))


def compact(svg: str) -> str:
    """Return matplotlib's SVG without comments, empty groups, unused ids and digits that nobody sees."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if element.tag == f"{{{SVG}}}style":
            element.text = STYLE
        for name in ("d", "transform", "style", "x", "y", "width", "height"):
            if name in element.attrib and element is not root:
                element.set(name, _shorter(element.attrib[name]))
        if "rotate(0 " in element.get("transform", ""):
            del element.attrib["transform"]
    _without_groups(root)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    ElementTree.indent(root, "")
    return re.sub(r"\s+/>", "/>", ElementTree.tostring(root, encoding="unicode")) + "\n"


def _shorter(text: str) -> str:
    """Return an attribute on one line, with two decimals."""
    text = FONT.sub("", text)
    text = re.sub(r"-?\d+\.\d{2,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
    return " ".join(text.split()).replace("-0 ", "0 ")


def _without_groups(element: ElementTree.Element) -> None:
    """Replace groups without attributes by their contents."""
    for child in list(element):
        _without_groups(child)
        if child.tag == f"{{{SVG}}}g" and not child.attrib:
            at = list(element).index(child)
            element.remove(child)
            for offset, inner in enumerate(child):
                element.insert(at + offset, inner)
