"""A report as one HTML file: the style that all share, and templates that escape whatever stands in them.

No script and nothing from the network; the policy in each template forbids both, because replies of models and names
of servers stand there. Charts are drawn by `clients/charts.py`.

    >>> render_page(Path("report.html.jinja"), {}, title="a <b>")
    '<!doctype html>...a &lt;b&gt;...'
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

STYLE = Path(__file__).with_name("page.css")


def render_page(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page of a template; `style` in it is the shared style."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(values, style=style)
