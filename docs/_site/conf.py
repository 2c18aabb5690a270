"""How Sphinx makes the site: `make docs`. The source folder is the repository, so that a relative link from
one page to another, or to a file of the code, is the same on the code host and in the site.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import pctt  # noqa: E402

project = "pctt"
author = "The pctt contributors"
copyright = author
release = version = pctt.__version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "kernels/**"]
exclude_patterns = [".*", "build", "dist", "generated", "runs", "pctt", "tests", "tools", "docs/_site"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "docstrings", "repository"]

# Markdown as the code host reads it: no extensions of syntax, anchors at headings.
myst_enable_extensions = []
myst_heading_anchors = 4
# Notebooks are shown as they are stored; tools/notebooks.py runs them.
nb_execution_mode = "off"
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Weights": "~pctt.network.Weights", "Data": "~pctt.run.Data"}
autodoc_default_options = {"members": True, "exclude-members": "__init__,__new__"}
add_module_names = False
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"pctt {release}"
html_copy_source = False
html_show_sphinx = False
smartquotes = False  # quoted words are values to type
html_static_path = ["static"]
html_css_files = ["site.css"]
