# SPDX-License-Identifier: GPL-2.0
"""Conversion of the sources of this repository for a kernel tree.

The crate `vfio` becomes the module `kernel::vfio`: `crate` becomes `crate::vfio`, and
`kernel` becomes `crate`. In drivers, `vfio` becomes `kernel::vfio`. The rest of a
source does not change.
"""

import re
import textwrap

# Names that are in the kernel crate itself and not in `kernel::vfio`.
AT_TOP = (
    "bindings",
    "module_emulated_driver",
    "module_mdev_driver",
    "module_param_text",
    "module_text_param",
    "module_vfio_pci_driver",
    "vfio_pci_device_table",
)
# Items that are public enough inside of the kernel crate, and statements that are of no
# use there.
SCAFFOLD = "compat"
OWN_STATEMENT = re.compile(rf"^ *let (\w+) = {SCAFFOLD}::\w+\(\1\);\n", re.MULTILINE)
# Replacements in documentation, such as paths of files.
PLACES = (
    ("samples/vfio_minimal", "samples/rust/vfio_minimal"),
    ("samples/vfio_mock", "samples/rust/vfio_mock"),
    ("samples/vfio_fw", "samples/rust/vfio_fw"),
    ("rust/vfio/", "rust/kernel/vfio/"),
    ("rust/helpers/vfio_trace.h", "include/trace/events/vfio_migration.h"),
    ("in a folder of its own, which `tools/new-driver` creates", "in `samples/rust/Makefile`"),
    ("The crate implements", "The module implements"),
    ("on the crate `vfio`", "on `kernel::vfio`"),
    ("example on the front page of the crate", "example on the page of the module"),
)

USE = re.compile(r"^(pub(?:\([a-z]+\))? )?use ([^;]+);\n", re.MULTILINE)
FENCE = re.compile(r"^(\s*//[/!]) ?```(.*)$")
DOC = re.compile(r"^\s*//[/!]")
WIDTH = 100


class Tree:
    """A `use` tree, from names to subtrees."""

    def __init__(self):
        self.below = {}

    def add(self, path):
        """Adds a path, a list of names."""
        if path:
            self.below.setdefault(path[0], Tree()).add(path[1:])

    def lines(self, name):
        """Returns the lines of the tree below `name`, one for each item."""
        if not self.below:
            return [name]
        if len(self.below) == 1:
            child, tree = next(iter(self.below.items()))
            if child != "self":
                return tree.lines(f"{name}::{child}")
        lines = []
        for child in sorted(self.below, key=order):
            item = self.below[child].lines(child)
            lines += [f"    {line}" for line in item[:-1]] + [f"    {item[-1]},"]
        # Keeps the items of the list on lines of their own.
        if len(item) == 1:
            lines[-1] += " //"
        return [f"{name}::{{", *lines, "}"]


def order(name):
    """Returns the sort key of rustfmt: self, names in lower case, others, the star."""
    bare = name.split(" ")[0]
    if bare in ("self", "super"):
        return (0, bare)
    if bare == "*":
        return (4, bare)
    if bare.isupper():
        return (3, bare)
    return (1 if bare[:1].islower() else 2, bare)


def split(text):
    """Splits a list at its commas, but not at those in inner braces."""
    items, depth, item = [], 0, ""
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += char
    return [item for item in map(str.strip, [*items, item]) if item]


def without_comments(source):
    """Returns the source without its comments."""
    return re.sub(r"//.*", "", source)


def paths(text):
    """Returns all paths of a `use` declaration."""
    text = without_comments(text).strip()
    head, brace, rest = text.partition("{")
    prefix = [name for name in head.strip().split("::") if name]
    if not brace:
        return [prefix]
    inner = rest.rpartition("}")[0]
    return [prefix + path for item in split(inner) for path in paths(item)]


def moved(path):
    """Returns the path in the kernel crate for a path of the crate `vfio`, if any."""
    if path[0] == "kernel":
        return ["crate", *path[1:]]
    if path[0] == "crate" and path[1] == SCAFFOLD:
        return None
    if path[0] == "crate" and path[1] not in AT_TOP:
        return ["crate", "vfio", *path[1:]]
    return path


def driver_moved(path):
    """Like moved(), for a driver."""
    return ["kernel", *path] if path[0] == "vfio" else path


def uses(source, move):
    """Merges the first `use` declarations; returns the text before, them, the rest."""
    block = []
    for use in USE.finditer(source):
        # One block: only blank lines and other declarations in between.
        if block and source[block[-1].end() : use.start()].strip():
            break
        block.append(use)
    if not block:
        return source, "", ""
    private, pieces = Tree(), []
    for use in block:
        tree = Tree() if use[1] else private
        for path in filter(None, map(move, paths(use[2]))):
            tree.add(path)
        if use[1]:
            pieces += [(f"{use[1]}use {r}", t) for r, t in tree.below.items()]
    ranks = ["core", "crate", "kernel"]
    roots = sorted(
        private.below, key=lambda r: (ranks.index(r) if r in ranks else len(ranks), r)
    )
    pieces = [(f"use {root}", private.below[root]) for root in roots] + pieces
    text = "\n".join("\n".join(tree.lines(name)) + ";\n" for name, tree in pieces)
    return source[: block[0].start()], text, source[block[-1].end() :]


def later_uses(source, move):
    """Converts the declarations outside of the first block, each by itself."""

    def use(found):
        tree = Tree()
        for path in filter(None, map(move, paths(found[2]))):
            tree.add(path)
        lines = ("\n".join(below.lines(root)) + ";\n" for root, below in tree.below.items())
        # A mark for crate_line(), which would convert a path a second time.
        return "".join(f"{found[1] or ''}use {line}".replace("crate::", "\0") for line in lines)

    return USE.sub(use, source)


def prose(line):
    """Returns a line of documentation with the paths of the kernel tree."""
    for here, there in PLACES:
        line = line.replace(here, there)
    return line


def examples(lines):
    """Returns each line with whether it is in a Rust example.

    An example that needs the driver on the front page is marked `ignore`: a
    documentation test is a function, and cannot be a module.
    """
    result, start = [], None
    for line in lines:
        fence = FENCE.match(line)
        if fence and start is None:
            start = len(result)
            result.append([line, None])
        elif fence:
            words = FENCE.match(result[start][0])
            if not words[2]:
                result[start][0] = f"{words[1]} ```ignore"
            result.append([line, None])
            start = None
        else:
            code = start is not None and not FENCE.match(result[start][0])[
                2
            ].startswith("sh")
            result.append([line, code])
    return result


def start_of(text):
    """Returns the bullet or number of an item of a list, empty for other lines."""
    item = re.match(r"(\* |- |\d+\. )", text)
    return item[1] if item else ""


def wrapped(lines):
    """Wraps the paragraphs of documentation that became too wide."""
    out, paragraph, fence = [], [], False

    def close():
        if any(len(line) > WIDTH for line in paragraph):
            prefix = DOC.match(paragraph[0])[0] + " "
            texts = [line[len(prefix) :] for line in paragraph]
            first = start_of(texts[0])
            indent = " " * (len(texts[0]) - len(texts[0].lstrip()) + len(first))
            out.extend(
                textwrap.wrap(
                    " ".join(text.strip() for text in texts),
                    WIDTH,
                    initial_indent=prefix + indent[len(first) :],
                    subsequent_indent=prefix + indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        else:
            out.extend(paragraph)
        paragraph.clear()

    for line in lines:
        fenced = FENCE.match(line)
        fence ^= bool(fenced)
        doc = DOC.match(line)
        text = line[doc.end() :].removeprefix(" ") if doc else ""
        plain = (
            text
            and not fence
            and not fenced
            and text[0] not in "#|"
            and "]: " not in text
        )
        if not plain or start_of(text):
            close()
        if plain:
            paragraph.append(line)
        else:
            out.append(line)
    close()
    return out


def crate_line(line, example):
    """Converts a line of the crate that is not part of a `use` declaration."""
    own = rf"crate::(?!{'|'.join(AT_TOP)})(?=[A-Za-z])"
    if DOC.match(line):
        if example:
            line = driver_line(line)
        return prose(re.sub(rf"(?<![\w$]){own}", "crate::vfio::", line))
    line = re.sub(rf"\$({own})", r"$\1vfio::", line)
    line = re.sub(r"(?<![\w:])::kernel::", "$crate::", line)
    # Do not replace a `crate` that was already converted.
    line = re.sub(rf"(?<![\w$]){own}", "\0vfio::", line)
    line = re.sub(r"(?<![\w:$])kernel::", "crate::", line)
    return line.replace("\0", "crate::")


def driver_line(line):
    """Converts a line of a driver that is not part of a `use` declaration."""
    macros = "module_(?:(?:emulated|mdev|vfio_pci)_driver|text_param)|vfio_pci_device_table"
    line = re.sub(rf"(?<![\w:])vfio::((?:{macros})!)", r"kernel::\1", line)
    return re.sub(r"(?<![\w:\"])vfio::(?=[a-zA-Z{])", "kernel::vfio::", line)


def crate_source(source):
    """Converts a file of the crate to a file of `kernel::vfio`."""
    head, declarations, tail = uses(OWN_STATEMENT.sub("", source), moved)
    out = []
    for part in (head, tail):
        lines = [crate_line(*line) for line in examples(later_uses(part, moved).split("\n"))]
        out.append("\n".join(wrapped(lines)))
    return out[0] + declarations + out[1]


def driver_source(source):
    """Converts a file of a driver to a file of a driver in the tree."""
    head, declarations, tail = uses(source, driver_moved)
    out = []
    for part in (head, tail):
        lines = map(driver_line, part.split("\n"))
        lines = [prose(line) if DOC.match(line) else line for line in lines]
        out.append("\n".join(wrapped(lines)))
    return out[0] + declarations + out[1]
