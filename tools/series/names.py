# SPDX-License-Identifier: GPL-2.0
"""Check that no patch uses a name of the crate that a later patch adds."""

import re
import sys

import intree
from patches import crate_path, declared

# A path in a macro is resolved where the macro is used.
NO_CODE = re.compile(r"//.*|\$crate(::\w+)+")
PATH = re.compile(r"(?<![\w:])(?:crate::vfio|self|super)(?:::\w+)+")


def imports(text):
    """Returns all paths of the `use` declarations."""
    return [path for use in intree.USE.finditer(text) for path in intree.paths(use[2])]


def has_word(word, text):
    """Does a text have this word?"""
    return re.search(rf"\b{re.escape(word)}\b", text)


class Names:
    """The modules of the crate so far, and the names that they use."""

    def __init__(self, tree):
        self.tree = tree
        self.all = declared(set(tree.files.crate))
        self.there = set()
        self.text = {}

    def check(self):
        """Checks the modules that have changed."""
        self.there = declared(self.tree.modules)
        changed = []
        for module in ["", *sorted(self.there)] if self.there else ():
            text = NO_CODE.sub("", self.tree.read(crate_path(module)))
            if self.text.get(module) != text:
                self.text[module] = text
                changed.append(module)
        for module in changed:
            for name in [*self.left_out(module), *self.later(module)]:
                sys.exit(f"{crate_path(module)} uses {name} before it is there")

    def left_out(self, module):
        """Yields names that the code uses, although their import is left out."""
        final = self.tree.files.text[crate_path(module)]
        names = [{path[-1].split(" ")[-1] for path in imports(text)} - {"*", "_", "self"}
                 for text in (final, self.text[module])]
        code = intree.USE.sub("", self.text[module])
        yield from (name for name in sorted(names[0] - names[1]) if has_word(name, code))

    def later(self, module):
        """Yields paths to modules and items that are not there."""
        text = self.text[module]
        paths = imports(text)
        paths += [path[0].split("::") for path in PATH.finditer(intree.USE.sub("", text))]
        above = module.split("/") if module else []
        for path in paths:
            supers = path.count("super")
            if path[:2] == ["crate", "vfio"]:
                own = path[2:]
            elif path[0] == "self":
                own = above + path[1:]
            elif supers:
                own = above[:-supers] + path[supers:]
            else:
                continue
            if not self.exists(own):
                yield "::".join(path)

    def exists(self, path):
        """Is this module there, or an item with this name in its module?"""
        module = ""
        for name in (part.split(" ")[0] for part in path):
            below = f"{module}/{name}".lstrip("/")
            if name in ("*", "self"):
                return True
            if below not in self.all:
                return has_word(name, self.text[module])
            if below not in self.there:
                return False
            module = below
        return True
