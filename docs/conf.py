"""Sphinx's settings: `make docs` writes the site to site/, offline."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import glassflows

project = "glassflows"
author = copyright = "The glassflows developers"
version = release = glassflows.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_custom_sections = ["Reference"]
default_role = "code"
add_module_names = False

html_theme = "furo"
html_title = f"glassflows {release}"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "github-dark"


def mathml(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw by themselves: no script, nothing from elsewhere."""
    drawn = convert(node.astext(), display="block" if isinstance(node, nodes.math_block) else "inline")
    drawn = re.sub(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>', letter, drawn)
    # a prime is raised as it is
    drawn = re.sub(r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>", r"<mrow>\1<mo>′</mo></mrow>", drawn)
    self.body.append(drawn)
    raise nodes.SkipNode


def letter(match: re.Match[str]) -> str:
    """Return 𝒩 and 𝔼 as such, because browsers draw them no more as a variant of N and E."""
    first = {"script": "𝒜", "double-struck": "𝔸"}[match[1]]
    return f"<mi>{chr(ord(first) + ord(match[2]) - ord('A'))}</mi>"


def plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring: plain text with `code`, `Args:`, indented equations and examples."""
    example = next((i for i, line in enumerate(lines) if line == "Example:"), len(lines))
    sections = next((i for i, line in enumerate(lines) if re.match(r"\w+:$", line)), len(lines))
    written: list[str] = []
    for i, line in enumerate(lines[:example]):
        if line.startswith("    ") and i < sections:  # an equation
            if not lines[i - 1] and not lines[i - 2].startswith("    "):
                written += ["::", ""]
        else:
            spans = line.split("`")  # every second one is code
            spans[::2] = [re.sub(r"([*|]|_(?=\W|$))", r"\\\1", span) for span in spans[::2]]
            line = "`".join(spans)
        written.append(line)
    shown = lines[example + 1 :]
    if shown and not shown[0].lstrip().startswith(">>>"):
        shown = ["    .. code-block:: python", "", *("    " + line for line in shown)]
    lines[:] = [*written, *lines[example : example + 1], *shown]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
