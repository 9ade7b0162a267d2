"""HTML pages from the templates next to this file. A page needs nothing else: no font, no address."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.reports.charts import CSS_COLORS, DASHES

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals |= {"colors": CSS_COLORS, "dashes": DASHES}


def render_page(template: str, **values: Any) -> str:
    """Return the page of a template; values are escaped unless they are `Markup`."""
    return _ENVIRONMENT.get_template(template).render(values)
