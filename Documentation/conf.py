# SPDX-License-Identifier: GPL-2.0
"""How Sphinx builds these documents: make htmldocs."""

project = "VFIO live migration in Rust"
author = "its authors"
copyright = f"{author}, GPL-2.0"
root_doc = "index"
exclude_patterns = ["ABI"]
# Blocks of commands are told by their prompts, the others name their language.
highlight_language = "none"
html_theme = "alabaster"
html_theme_options = {"page_width": "1060px", "fixed_sidebar": True}
html_show_sphinx = False
# The same sources give the same pages.
html_last_updated_fmt = None
