"""HTML pages from Jinja2 templates, and the form of their numbers."""

import math
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).with_name("templates")


def render(template: Path, **values: Any) -> str:
    """Return the page of a template, with every value escaped.

    The template may extend `base.html`, which needs `title` and `status`, and import from `parts.html`. Its filters
    include `number` and `duration`. An undefined name is an error.

    Args:
        template: file of the template.
        **values: names that the template uses. Only `markupsafe.Markup` enters the page as HTML.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "duration": duration}
    return environment.get_template(template.name).render(values).lstrip()


def number(value: float | None, form: str) -> str:
    """Return a number in a format specification, or a dash for None and numbers that are not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form).replace("%", " %")


def duration(seconds: float | None) -> str:
    """Return a duration in seconds, minutes or hours, or a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
