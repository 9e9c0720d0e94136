"""Headings, sentences, tables and pictures -> one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from segkit.runs import write_whole

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em; }}
h2 {{ font-size: 1.15em; margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: 0.8em; }}
p.lead {{ font-size: 1.1em; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }}
th {{ background: #f4f4f4; position: sticky; top: 0; }}
td.text, th.text {{ text-align: left; }}
div.table {{ overflow: auto; max-height: 34em; display: inline-block; max-width: 100%; }}
</style>
</head>
<body>
"""


@dataclass(frozen=True)
class Section:
    """A heading with a sentence, and below them a picture, a table, or both."""

    heading: str
    text: str = ""
    picture: Path | None = None  # PNG
    table: pd.DataFrame | None = None


def write_report_page(path: str | Path, title: str, lead: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all. `lead`: paragraphs below the title. All words are text, never markup.

    Browsers are told to run no script in it and to fetch nothing, whatever the names of structures may hold.
    """
    parts = [_HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>\n"]
    parts += [f'<p class="lead">{escape(paragraph)}</p>\n' for paragraph in lead]
    for section in sections:
        parts.append(f"<section>\n<h2>{escape(section.heading)}</h2>\n")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>\n")
        if section.picture is not None:
            content = base64.b64encode(Path(section.picture).read_bytes()).decode()
            parts.append(f'<img alt="{escape(section.heading)}" src="data:image/png;base64,{content}">\n')
        if section.table is not None:
            parts.append(f'<div class="table">{_table(section.table)}</div>\n')
        parts.append("</section>\n")
    page = "".join([*parts, "</body>\n</html>\n"])
    return write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _table(table: pd.DataFrame) -> str:
    """Numbers with three digits at most, words on the left, "-" for what has no value."""
    kinds = ["" if pd.api.types.is_numeric_dtype(table[column]) else ' class="text"' for column in table.columns]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for name, kind in zip(table.columns, kinds, strict=True))
    rows = (
        "".join(f"<td{kind}>{escape(_cell(value))}</td>" for value, kind in zip(row, kinds, strict=True))
        for row in table.itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
