"""Self-contained pages: one HTML file each, no network, no scripts, light and dark.

Every text that is given to a function here is escaped by it: articles and labels are written by
strangers. `Html` is what is escaped already.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NewType

Html = NewType("Html", str)

# Nothing is fetched and nothing is run, whatever slipped into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
# Without meaning in HTML, or turning the direction of all that follows.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONG = re.compile(r"\S{13,}")
_JOINT = re.compile(r"/+|[_=]|\.(?=[a-z])")  # of a path or a name

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f4f5f7; --card: #fff; --ink: #1a1c20; --muted: #565c66; --faint: #8a909a;
  --line: #dcdfe4; --accent: #1f5fbf; --second: #b4530a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111317; --card: #1b1e24; --ink: #e6e8ec; --muted: #a7adb8; --faint: #7d8490;
    --line: #33373f; --accent: #74a9ff; --second: #f0934e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem clamp(0.75rem, 3vw, 2rem) 3rem; max-width: 80rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.25rem; }
h2 { font-size: 1.125rem; margin: 0 0 0.75rem; }
p { margin: 0 0 0.75rem; }
.muted, figcaption, caption { color: var(--muted); font-size: 0.875rem; }
main { display: grid; gap: 1rem; margin-top: 1rem; grid-template-columns: minmax(0, 1fr); }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 1rem;
  min-width: 0;
}
.beside { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 60rem) {
  main { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  section.wide { grid-column: 1 / -1; }
  .beside { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
dl.numbers {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: 0.75rem 1rem;
  margin: 0 0 1rem;
}
dl.numbers div { display: flex; flex-direction: column; }
dl.numbers dt { color: var(--muted); font-size: 0.875rem; }
dl.numbers dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
dl.numbers dd small { display: block; font-size: 0.8125rem; color: var(--muted); }
p.good b { color: var(--accent); }
p.bad b { color: var(--second); }
p.bad { border-inline-start: 3px solid var(--second); padding-inline-start: 0.75rem; }
ul.plain { margin: 0 0 0.75rem; padding-inline-start: 1.25rem; }
pre {
  margin: 0 0 0.75rem; padding: 0.6rem 0.75rem; border: 1px solid var(--line);
  border-radius: 0.375rem; background: var(--paper); font-size: 0.875rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
figure { margin: 0 0 0.75rem; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
.scroll {
  overflow-x: auto; /* the shadows on its edges say that there is more */
  background:
    linear-gradient(to right, var(--card) 50%, transparent) 0 / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 50%, transparent) 100% / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--line), transparent) 0 / 0.5rem 100% no-repeat scroll,
    linear-gradient(to left, var(--line), transparent) 100% / 0.5rem 100% no-repeat scroll;
}
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; }
caption { text-align: start; padding-bottom: 0.25rem; }
caption.unseen { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: start; }
th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; vertical-align: top; min-width: 8.5rem; }
td { vertical-align: top; }
tbody td:not(.number) { min-width: 6rem; }
thead th { overflow-wrap: break-word; }
.number { text-align: end; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
tbody th.number { min-width: 0; }
tbody .number { white-space: nowrap; }
summary { cursor: pointer; color: var(--accent); padding: 0.25rem 0; }
ol.articles { margin: 0; padding-inline-start: 1.75rem; }
ol.articles li { margin-bottom: 1rem; }
ol.articles p { margin: 0; }
ol.articles p:first-child { font-weight: 600; }
footer { margin-top: 1.5rem; }
"""


def page(title: str, subtitle: str, sections: Iterable[Html], footer: str) -> bytes:
    """A whole page, as the bytes of its file."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
    )
    body = (
        f"<body>\n<header>\n<h1>{text(title)}</h1>\n"
        f'<p class="muted">{_words(subtitle)}</p>\n</header>\n<main>\n{"".join(sections)}</main>\n'
        f'<footer class="muted">{text(footer)}</footer>\n</body>\n</html>\n'
    )
    # A file name that is not UTF-8 arrives with lone surrogates, which have no bytes.
    return (head + body).encode("utf-8", "replace")


def text(content: object) -> Html:
    """A text as it may stand anywhere in a page, attributes included."""
    return Html(escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(content))))


def _words(content: object) -> Html:
    """A text between tags. A long path or name is broken at its joints rather than anywhere."""
    return Html(_LONG.sub(lambda word: _JOINT.sub(r"\g<0><wbr>", word[0]), text(content)))


def section(heading: str, *content: Html, wide: bool = False) -> Html:
    """A card of the page; a wide one takes both columns of a broad screen."""
    kind = ' class="wide"' if wide else ""
    return Html(f"<section{kind}>\n<h2>{text(heading)}</h2>\n{''.join(content)}</section>\n")


def paragraph(content: str) -> Html:
    """A few words."""
    return Html(f"<p>{_words(content)}</p>\n")


def verdict(content: str, *, good: bool) -> Html:
    """A sentence that says whether all is well; not by colour alone."""
    mark = "\N{CHECK MARK}" if good else "\N{BALLOT X}"
    kind = "good" if good else "bad"
    return Html(f'<p class="{kind}"><b aria-hidden="true">{mark}</b> {_words(content)}</p>\n')


def bullets(lines: Iterable[str]) -> Html:
    """Sentences below one another; nothing where there are none."""
    entries = "".join(f'<li dir="auto">{_words(line)}</li>\n' for line in lines)
    return Html(f'<ul class="plain">\n{entries}</ul>\n' if entries else "")


def command(line: str) -> Html:
    """A line for a shell."""
    return Html(f"<pre><code>{_words(line)}</code></pre>\n")


def numbers(named: Iterable[tuple[str, str, str]]) -> Html:
    """Name, value and a word on it, for the few numbers that a reader looks for first."""
    entries = (
        f"<div><dt>{_words(name)}</dt><dd>{_words(value)}"
        f"{f'<small>{_words(note)}</small>' if note else ''}</dd></div>\n"
        for name, value, note in named
    )
    return Html(f'<dl class="numbers">\n{"".join(entries)}</dl>\n')


def figure(svg: str, caption: str) -> Html:
    """A plot, from `plots.to_svg`, which escapes its texts and says what it shows."""
    return Html(f"<figure>\n{svg}\n<figcaption>{_words(caption)}</figcaption>\n</figure>\n")


def beside(*content: Html) -> Html:
    """In two columns where the screen is broad enough: a plot and its table in a wide section."""
    return Html(f'<div class="beside">\n{"".join(content)}</div>\n')


def table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    num_texts: int = 1,
    seen: bool = True,
) -> Html:
    """A table that scrolls by itself on a narrow screen.

    Args:
        caption: what it holds; where a heading says so already it need not be seen.
        header: names of the columns.
        rows: the first value of each names its row.
        num_texts: so many columns from the left hold text; the others hold numbers.
        seen: whether the caption is shown, rather than read aloud alone.
    """

    def kind(place: int) -> str:
        return "" if place < num_texts else ' class="number"'

    heads = "".join(
        f'<th scope="col"{kind(place)}>{_words(name)}</th>' for place, name in enumerate(header)
    )
    lines = []
    for first, *others in rows:
        cells = "".join(
            f'<td{kind(place)} dir="auto">{_words(value)}</td>'
            for place, value in enumerate(others, start=1)
        )
        lines.append(f'<tr><th scope="row" dir="auto"{kind(0)}>{_words(first)}</th>{cells}</tr>\n')
    look = "" if seen else ' class="unseen"'
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">\n<table>\n'
        f"<caption{look}>{_words(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>\n"
    )


def folded(summary: str, *content: Html) -> Html:
    """What a reader opens on demand; works without scripts."""
    return Html(f"<details>\n<summary>{_words(summary)}</summary>\n{''.join(content)}</details>\n")


def articles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """A numbered list of a line in words, where the article stands, and its text."""
    lines = (
        f'<li><p dir="auto">{_words(line)}</p><p class="muted" dir="auto">{_words(place)}</p>'
        f'<p dir="auto">{_words(content)}</p></li>\n'
        for line, place, content in entries
    )
    return Html(f'<ol class="articles">\n{"".join(lines)}</ol>\n')
