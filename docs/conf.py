"""Sphinx configuration; builds without a network."""

import os
import sys
import warnings
from pathlib import Path

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
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "command_line",  # of this folder
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"
autosummary_generate = True
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the parameters say more

html_theme = "pydata_sphinx_theme"
html_title = "sksoup"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"**": ["globaltoc.html"]}  # all pages, under their captions
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "navbar_center": [],
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "backreferences_dir": None,
    "min_reported_time": 1,
    "show_memory": False,
    "abort_on_example_error": True,
}
# a figure that is shown without a screen
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")
