"""Parts of HTML pages that need nothing else: no script, no font, no address."""

from collections.abc import Iterable, Sequence
from html import escape

COLOURS = ("#1f5fa8", "#e08e0b", "#2a8a5c", "#b3261e", "#7a4fa3", "#4a4a4a")  # the first two tell apart in grey

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; color: #555; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } svg { width: 100%; height: auto; }
.small { color: #555; font-size: .85rem; overflow-wrap: anywhere; }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page of HTML parts; `style` is CSS behind the common one."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table of texts; `kind` is its CSS class."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def svg(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    """An SVG element; `title` is what screen readers say."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>' + "".join(parts) + "</svg>"
    )


def svg_text(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Text in an SVG element; `anchor` is `start`, `middle` or `end`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#1c1c1c">{escape(text)}</text>'
