"""Templates filled in: what the report and the model card share."""

from pathlib import Path
from typing import Any

from qlora.terminal import redact

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, values: dict[str, Any]) -> str:
    """Fill in a template; in HTML every value is escaped.

    Args:
        name: of a file in templates/.
        values: by the names that the template uses; one that is missing is an error, never an empty place.

    Returns:
        The text, access tokens masked.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",), default_for_string=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return redact(environment.get_template(name).render(values))
