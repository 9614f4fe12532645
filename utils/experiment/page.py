"""The report: one HTML page without anything outside it, to be read on a screen or on paper."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from utils.passes.log import PassLog

_STYLE = """
@page { size: A4; margin: 18mm 16mm }
body { max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; color: #26323c; background: #fff;
  font: 16px/1.5 "Source Serif 4", Charter, Georgia, serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; break-after: avoid } h2 + p { break-after: avoid }
.lead { color: #5a6873; margin: 0 0 2rem } figure { margin: 1.2rem 0; break-inside: avoid }
figure img { max-width: 100%; height: auto; display: block } figcaption { color: #5a6873; font-size: .87rem; margin-top: .4rem }
table { border-collapse: collapse; font: 14px/1.45 "Source Sans 3", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; break-inside: avoid; margin: .6rem 0 }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; vertical-align: top } th { font-weight: 600; border-bottom: 1.5px solid #26323c }
td:first-child, th:first-child, td.text, th.text { text-align: left } tr + tr td { border-top: 1px solid #e3e8ec }
code, pre { font: 13px/1.5 "JetBrains Mono", Menlo, Consolas, monospace } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: #f4f6f8; padding: .8rem 1rem; border-radius: 4px } ul { padding-left: 1.2rem } summary { cursor: pointer; color: #3b6ea8 }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 11pt } details { display: none } a { color: inherit } }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what one sees in it."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two on what follows, and its pictures."""

    title: str
    text: str
    pictures: Sequence[Picture]


def write(
    file: Path,
    title: str,
    lead: str,
    table: Sequence[Sequence[str]],
    log: PassLog,
    sections: Sequence[Section],
    line: Mapping[str, Any],
) -> Path:
    """Write the page.

    table: its rows, the first one the heading. line: what was recorded, for the command and the versions.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        _table(table),
        *_ranking(line.get("ranking")),
        "<h2>Passes</h2>",
        _passes(log),
        *(_section(section) for section in sections if section.pictures),
        "<h2>To repeat it</h2>",
        f"<pre>{escape(line['command'])}</pre>",
        f"<p>{escape(_versions(line))}</p>",
    ]
    file.write_text(_document(title, "\n".join(parts)), encoding="utf-8")
    return file


def write_findings(file: Path, title: str, findings: Mapping[str, Sequence[str]]) -> Path:
    """Write a page of lines by heading; a line's part before its first colon is what it is about."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for heading, lines in findings.items():
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<h2>{escape(heading)}</h2><ul>{items}</ul>")
    file.write_text(_document(title, "\n".join(parts)), encoding="utf-8")
    return file


def write_index(file: Path, title: str, lead: str, table: Sequence[Sequence[str]], links: Sequence[str]) -> Path:
    """The page of a table whose rows have pages of their own. links: to each row's page."""
    head, *rows = table
    body = "".join(
        f'<tr><td><a href="{escape(link)}">{escape(row[0])}</a></td>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row, link in zip(rows, links, strict=True)
    )
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    parts = f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p><table><tr>{heading}</tr>{body}</table>'
    file.write_text(_document(title, parts), encoding="utf-8")
    return file


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _ranking(ranking: Mapping[str, Any] | None) -> list[str]:
    """The candidates of a search, the nearest to float first."""
    if ranking is None:
        return []
    rows = [
        [
            one["recipe"],
            f"{one['noise']:.1f}",
            f"{one['agreement']:.2f}",
            f"{one['saturation']:.3f}",
            " ".join(one["flags"]),
        ]
        for one in ranking["candidates"]
        if "noise" in one
    ]
    head = ["candidate", "dB over noise", "agreement in %", "most cut in %", "flags"]
    return ["<h2>Candidates</h2>", f"<p>{escape(ranking['why'])}</p>", _table([head, *rows])]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _passes(log: PassLog) -> str:
    """What was applied and skipped, the notes, and the whole list folded away."""
    rows = "".join(
        f"<tr><td>{escape(action)}</td><td>{count['applied']}</td><td>{count['skipped'] or ''}</td>"
        f'<td class="text">{escape("; ".join(log.reasons(action)))}</td></tr>'
        for action, count in log.counts().items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*log.notes, *log.warnings))
    return (
        f'<table><tr><th>pass</th><th>applied</th><th>skipped</th><th class="text">commonest reasons</th></tr>{rows}</table>'
        + (f"<ul>{notes}</ul>" if notes else "")
        + f"<details><summary>Every layer</summary><pre>{escape(log.listing())}</pre></details>"
    )


def _section(section: Section) -> str:
    pictures = "".join(
        f'<figure><img alt="{escape(picture.caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.file.read_bytes()).decode()}"><figcaption>{escape(picture.caption)}</figcaption></figure>'
        for picture in section.pictures
    )
    return f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{pictures}"


def _versions(line: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if version)
    return f"{versions}; commit {line['commit'] or 'unknown'}; weights SHA-256 {line['weights_sha256'][:16]}; {line['time']}"
