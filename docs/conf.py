"""Sphinx configuration; builds without a network."""

import os
import sys
import warnings
from pathlib import Path

from docutils import nodes

import sksoup

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("MPLBACKEND", "Agg")

project = "sksoup"
author = "the sksoup developers"
copyright = "2026, the sksoup developers"
version = release = sksoup.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # equations are set without a network, too
    "myst_parser",  # for the changelog
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "command_line",  # of this folder
]
suppress_warnings = ["myst.header"]  # the changelog begins below the title of its page
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"
autosummary_generate = True
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the parameters say more

html_theme = "pydata_sphinx_theme"
html_title = "sksoup"
html_logo = html_favicon = "_static/logo.svg"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"**": ["globaltoc.html"]}  # all pages, under their captions
html_theme_options = {
    "logo": {"text": "sksoup"},
    "navigation_with_keys": False,
    "show_prev_next": True,
    "navbar_center": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"fit_",  # programs that pages of the documentation show
    "within_subsection_order": "teaching_order.place",
    "backreferences_dir": "generated/backreferences",
    "doc_module": ("sksoup",),
    "capture_repr": ("_repr_html_",),
    "show_signature": False,
    "min_reported_time": 1,
    "show_memory": False,
    "abort_on_example_error": True,
}
# a figure that is shown without a screen
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")

DESCRIPTION_LENGTH = 200


def describe_page(app, pagename, templatename, context, doctree):
    """Give a page its description for search engines and link previews: its first paragraph."""
    paragraph = doctree and doctree.next_node(
        lambda node: isinstance(node, nodes.paragraph) and isinstance(node.parent, nodes.section)
    )
    if paragraph:
        words = " ".join(paragraph.astext().split())
        if len(words) > DESCRIPTION_LENGTH:
            words = words[:DESCRIPTION_LENGTH].rsplit(" ", 1)[0] + " ..."
        context["description"] = words


def setup(app):
    """Connect what this file adds to Sphinx."""
    app.connect("html-page-context", describe_page)
