"""What pages for a browser are made of: the frame, sections, tables, numbers as people read them."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any


def number(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form).replace("%", " %")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numeric: bool = False) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    kind = ' class="numeric"' if numeric else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink: #1c2430; --muted: #5b6675; --line: #d9dee5; --page: #ffffff; --panel: #f5f7f9;
  --train: #2166ac; --validation: #c4500c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --muted: #9aa7b6; --line: #333d49; --page: #12171d; --panel: #1b222a;
    --train: #6fb1f2; --validation: #f5a05a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
.note { margin: .5rem 0; color: var(--muted); font-size: .9rem; }
.warnings { margin: 0; padding: .75rem 1rem .75rem 2rem; border-left: 4px solid var(--validation);
  background: var(--panel); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
.tiles div { padding: .75rem 1rem; background: var(--panel); border-radius: 6px; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; }
figure { margin: 0; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.wide, pre { overflow-x: auto; }
pre { margin: 0; padding: 1rem; background: var(--panel); border-radius: 6px; font-size: .82rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  font-weight: normal; white-space: nowrap; }
thead th { color: var(--muted); }
.numeric th, .numeric td { text-align: right; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$status</p>
$sections
</body>
</html>
""")
