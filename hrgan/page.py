"""What all pages share. Each is one file that needs no network, light and dark, for a phone and for a wide screen."""

import base64
import hashlib
import html
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hrgan.errors import UserError


def text(value: object) -> str:
    """For HTML, in text and in attributes: cut where very long, unseen characters as their escapes, such as \\n."""
    # Besides control characters half surrogate pairs, and what turns the direction of the text that follows.
    unseen = "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    text = re.sub(unseen, lambda match: match[0].encode("unicode_escape").decode(), str(value))
    return html.escape(text if len(text) <= 300 else f"{text[:300]}…")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped already; the first of each row names it."""
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th><td>{"</td><td>".join(row[1:])}</td></tr>' for row in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def plural(count: int, noun: str) -> str:
    """1 class, 2,000 classes."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names with their values side by side, the last over the whole width."""
    items = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{''.join(items)}</dl>"


def data_url(content: bytes, kind: str) -> str:
    """A picture inside the page. kind: such as jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def whole(title: str, body: str, style: str = "", script: str = "") -> str:
    """A page. title and body are escaped already; style is added to STYLE. The page may load nothing, and run nothing
    but the script, which it knows by its hash."""
    # The hash is of the element's text to the byte: nothing may come between the tags and the script.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}{f"; script-src 'sha256-{digest}'" if script else ""}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def write_page(path: Path, page: str) -> Path:
    """Write a page atomically, and return its path. UserError where its folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it or name another place")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


STYLE = """:root { color-scheme: light dark; --back: #fff; --fore: #1c2128; --soft: #57606a; --line: #d5dbe1;
  --panel: #f5f7f9; --plain: #3b6fd4; --red: #cf3a3a; --green: #2e9148; --blue: #3b6fd4; --grey: #6e7781;
  --alpha: #8a56c4;
  --warn: #fff1e5; }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --fore: #e2e7ec; --soft: #97a1ab; --line: #333b44;
  --panel: #1b2129; --plain: #6b9bf2; --red: #f07171; --green: #5cc878; --blue: #6b9bf2; --grey: #a3adb7;
  --alpha: #b98bea; --warn: #3a2716; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--fore); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 0; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; }
header p, figcaption, .axis, dt, thead th { color: var(--soft); }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; margin-top: 1.2rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: .8rem 1.5rem;
  margin: 0 0 1.2rem; }
dt { font-size: .85rem; }
dd { margin: 0; }
dl div:last-child { grid-column: 1 / -1; }
dl div:last-child dd, code { font: .875em/1.5 ui-monospace, monospace; }
code { background: var(--panel); padding: .1em .3em; border-radius: 4px; unicode-bidi: isolate; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { text-align: right; font-weight: normal; padding: .3rem 0 .3rem 1rem; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
tbody td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
@media (min-width: 40rem) { th, td { padding-left: 2rem; } }
summary { cursor: pointer; }
details { margin: .5rem 0; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
li { margin: .2rem 0; }
figure { margin: .8rem 0 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
"""
"""Colours, text and tables of every page."""
