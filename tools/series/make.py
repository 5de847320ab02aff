#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Make the series that adds this repository to a kernel tree.

    make.py KSRC FOLDER

KSRC is the source of Linux 7.3, which is not changed. FOLDER receives a folder for each
set in sets.py, with patches and a cover letter, and the table of the sets in table.rst.
The tree builds after each patch.

All files are first converted for a kernel tree. A patch adds some of them; lists of
files in others, such as `mod` declarations, have the files that are there so far. After
the last patch, the tree must be equal to the converted files.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import sets
from names import Names
from patches import LIMIT, Files, Tree, git, is_code


def base(source, tree):
    """Creates a repository with the files that the patches change."""
    for path in sets.CHANGED:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, tree / path)
    git(tree, "init", "--quiet")
    # rustfmt needs it, but no patch changes it.
    (tree / ".git/info/exclude").write_text(".rustfmt.toml\n")
    # Who posts the series replaces this identity.
    git(tree, "config", "user.name", "Author Name")
    git(tree, "config", "user.email", "author@example.org")
    commit(tree, "base")


def commit(tree, message):
    """Commits all changes."""
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--signoff", "--no-verify", "-F", "-", input=message)


def check_complete(tree):
    """Checks that the tree has all files of this repository."""
    bad = [path for path, text in tree.files.text.items()
           if not (tree.path / path).exists() or tree.read(path) != text]
    if bad:
        sys.exit(f"no patch in sets.py adds all of these files: {' '.join(bad)}")


class Size:
    """Lines of a patch."""

    def __init__(self, file):
        self.code = self.lines = 0
        path = ""
        for line in file.read_text().split("\n"):
            if line.startswith("+++ "):
                path = line[6:]
            elif path and line.startswith(("+", "-")) and not line.startswith("--- "):
                self.lines += 1
                self.code += line[0] == "+" and is_code(path, line[1:])


def table(folder):
    """Returns the table of the sets, and complains about patches that are too large."""
    rows, large = [("set", "needs", "patches", "lines", "code", "largest")], []
    for one in sets.SETS:
        sizes = {file.name: Size(file) for file in sorted((folder / one.name).glob("*.patch"))
                 if not file.name.startswith("0000-")}
        largest = max(size.code for size in sizes.values())
        rows.append((one.name, ", ".join(one.needs) or "-", len(sizes),
                     sum(size.lines for size in sizes.values()),
                     sum(size.code for size in sizes.values()), largest))
        limit = min(LIMIT, one.limit)
        large += [(f"{one.name}/{name}", size.code) for name, size in sizes.items()
                  if size.code > limit]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip()
             for row in rows]
    return "\n".join(["", rule, lines[0], rule, *lines[1:], rule, "", ""]), large


def write_set(tree, one, first, folder):
    """Writes the patches of a set with its cover letter, and the maintainers' addresses."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git(tree.path, "format-patch", "--quiet", "--cover-letter", "-o", folder.resolve(), first)
    cover = folder / "0000-cover-letter.patch"
    text = cover.read_text().replace("*** SUBJECT HERE ***", one.subject)
    cover.write_text(text.replace("*** BLURB HERE ***", one.cover.strip()))


def main():
    """Writes the series."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if not (source / "rust/kernel/lib.rs").is_file():
        sys.exit(f"{source} is not a kernel source with Rust")
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.patch"), *folder.glob("[0-9]-*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    files = Files(source)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Tree(Path(temporary), files)
        names = Names(tree)
        base(source, tree.path)
        for one in sets.SETS:
            first = git(tree.path, "rev-parse", "HEAD")
            for patch in one.patches:
                for part in patch.parts(files):
                    part.change(tree)
                    commit(tree.path, part.message)
                    names.check()
            write_set(tree, one, first, folder / one.name)
            needs = "".join(f"{name}\n" for name in one.needs)
            (folder / one.name / "needs").write_text(needs)
        check_complete(tree)
        (folder / "tree").write_text(git(tree.path, "rev-parse", "HEAD^{tree}") + "\n")
    text, large = table(folder)
    (folder / "table.rst").write_text(text)
    for name, lines in large:
        print(f"{name} has {lines} lines of code")
    sys.exit(bool(large))


if __name__ == "__main__":
    main()
