"""How Sphinx makes the pages of this folder: `make docs`."""

from __future__ import annotations

import html

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import fastopt

project = "fastopt"
author = copyright = "the authors of fastopt"
release = fastopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # an option's kind stands in its sentence
autodoc_member_order = "bysource"
nitpicky = True

html_theme = "furo"
html_title = "fastopt"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = html_show_sourcelink = html_show_search_summary = False
html_math_renderer = "svg"


# Formulas become pictures in the page, in its colour: no script, no fonts to fetch.
def svg(tex: str, size: float, inline: bool) -> str:
    formula = ziamath.Latex(tex, size=size, color="currentColor", inline=inline)
    said = f'role="img" aria-label="{html.escape(tex)}"'
    place = f'style="vertical-align: {formula.getyofst():.2f}px"'
    return formula.svg().replace("<svg ", f"<svg {said} {place} ", 1)


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(svg(node.astext(), 16, inline=True))
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    tex = node.astext()
    if not tex.startswith(r"\begin"):  # a docstring's, which Sphinx lets be aligned at &
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    translator.body.append(f'<div class="math">{svg(tex, 17, inline=False)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("svg", (inline, None), (block, None))
