# SPDX-License-Identifier: GPL-2.0
"""Files of this repository in a kernel tree, and patches that add them one by one."""

import dataclasses
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import intree

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
RUST = "VFIO ABSTRACTIONS AND SAMPLES [RUST]"
SUITE = "VFIO MIGRATION SELFTESTS"
LISTS = {RUST: ("kvm", "rust-for-linux"), SUITE: ("kvm", "linux-kselftest")}
# Lines of code in a patch.
LIMIT = 400
CRATE = "rust/kernel/vfio"
KUNIT = "drivers/vfio/kunit"
TESTS = "tools/testing/selftests/vfio_migration"
MOD = re.compile(r"^ *(?:#\[.*\]\n *)*(?:pub(?:\([a-z]+\))? )?mod (\w+);\n", re.MULTILINE)
SUITE_OF_TESTS = re.compile(
    r"^#\[kunit_tests\(\w+\)\]\nmod (\w+)_tests \{\n.*?^\}\n\n?", re.MULTILINE | re.DOTALL
)
KUNIT_MAKEFILE = """\
# SPDX-License-Identifier: GPL-2.0

obj-$(CONFIG_RUST_VFIO_KUNIT_TEST) += vfio_kunit.o
vfio_kunit-y := vfio_kunit_main.o vfio_kunit_core.o vfio_kunit_device.o
"""
UNFINISHED = [
    "",
    "#![allow(",
    "    dead_code,",
    "    unreachable_pub,",
    "    unused_imports,",
    '    reason = "patches to come use the rest"',
    ")]",
]


class Tree:
    """A repository with the patches so far."""

    def __init__(self, path, files):
        self.path = path
        self.files = files
        self.modules = set()

    def read(self, path):
        """Returns the current text of a file."""
        return (self.path / path).read_text()

    def write(self, path, text, mode=0o644):
        """Writes a file."""
        file = self.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def insert(self, path, after, text, before=False):
        """Inserts lines after the only line that is equal to `after`."""
        lines = self.read(path).split("\n")
        if lines.count(after) != 1:
            sys.exit(f"{path} does not have one line {after!r}: is this Linux 7.3?")
        at = lines.index(after) + (not before)
        lines[at:at] = text.split("\n")[: -1 if text.endswith("\n") else None]
        self.write(path, "\n".join(lines))

    def sort_in(self, path, text, among):
        """Inserts a line at its place in the order of the lines that match `among`."""
        lines = self.read(path).split("\n")
        others = [n for n, line in enumerate(lines) if re.match(among, line)]
        at = next((n for n in others if lines[n] > text), others[-1] + 1)
        lines.insert(at, text)
        self.write(path, "\n".join(lines))

    def maintain(self, entry, *patterns):
        """Adds the patterns to an entry in MAINTAINERS, which is created if missing."""
        text = self.read("MAINTAINERS")
        if f"\n{entry}\n" not in text:
            maintainer = git(self.path, "var", "GIT_COMMITTER_IDENT").rsplit(" ", 2)[0]
            lists = "".join(f"L:\t{name}@vger.kernel.org\n" for name in LISTS[entry])
            lines = f"{entry}\nM:\t{maintainer}\n{lists}S:\tMaintained\n\n"
            names = re.finditer(r"^(VFIO [^\n]*)\nM:", text, re.MULTILINE)
            first = next(name for name in names if name[1] > entry)
            text = text[: first.start()] + lines + text[first.start() :]
        start = text.index(f"\n{entry}\n") + 1
        end = text.index("\n\n", start)
        rest, *files = text[start:end].split("\nF:\t")
        lines = "\nF:\t".join([rest, *sorted({*files, *patterns})])
        self.write("MAINTAINERS", text[:start] + lines + text[end:])


def git(tree, *arguments, **options):
    """Runs git in a tree and returns its output."""
    return subprocess.run(
        ["git", "-C", tree, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    ).stdout.strip()


def rustfmt(tree, files):
    """Formats files like the kernel."""
    subprocess.run(
        [
            os.environ.get("RUSTFMT", "rustfmt"),
            *("--edition", "2021", "--config-path", tree / ".rustfmt.toml"),
            *("--config", "skip_children=true"),
            *files,
        ],
        check=True,
        stderr=subprocess.DEVNULL,
    )


class Files:
    """Files of this repository, converted for a kernel tree, by their path there."""

    def __init__(self, source):
        self.text = {}
        self.mode = {}
        self.crate = []
        self.suite = []
        self.add_crate()
        for name in ("vfio_membar", "vfio_minimal", "vfio_fw", "vfio_mock"):
            self.add_sample(name)
        self.add_suite()
        self.add_kunit()
        self.format(source)

    def match(self, patterns):
        """Returns the files that match the patterns, in this order."""
        found = [fnmatch.filter(sorted(self.text), pattern) for pattern in patterns]
        for pattern, paths in zip(patterns, found):
            if not paths:
                sys.exit(f"sets.py has {pattern}, which does not exist")
        return [path for paths in found for path in paths]

    def add_crate(self):
        """Adds the module `kernel::vfio`."""
        crate = TOP / "rust/vfio"
        for file in sorted(crate.rglob("*.rs")):
            name = str(file.relative_to(crate).with_suffix(""))
            text = file.read_text()
            path = f"{CRATE}/{name}.rs"
            if name == "lib":
                # Modules that only an out-of-tree crate needs.
                text = re.sub(r'#\[path = "[^"]*"\]\nmod \w+;\n+', "", text)
                path = f"{CRATE}.rs"
            else:
                self.crate.append(name)
            self.text[path] = re.sub(r"\n{3,}", "\n\n", intree.crate_source(text))

    def add_sample(self, name):
        """Adds a driver, in a folder of its own if it has more than one file."""
        folder = TOP / "samples" / name
        files = sorted(folder.rglob("*.rs"))
        for file in files:
            path = str(file.relative_to(folder)).replace("main.rs", f"{name}.rs")
            path = f"samples/rust/{name}/{path}" if len(files) > 1 else f"samples/rust/{path}"
            self.text[path] = intree.driver_source(file.read_text())
        if len(files) > 1:
            self.text[f"samples/rust/{name}/Makefile"] = (
                "# SPDX-License-Identifier: GPL-2.0\n\n"
                f"obj-$(CONFIG_SAMPLE_RUST_{name.upper()}) += {name}.o\n"
            )

    def add_kunit(self):
        """Adds the KUnit tests, a module."""
        testing = TOP / "tools/testing"
        for file in sorted([*(testing / "kunit").iterdir(), testing / "host/src/paths.rs"]):
            if file.suffix not in (".rs", ".c", ".h"):
                continue
            name, text = file.name.replace("vfio_kunit.rs", "vfio_kunit_main.rs"), file.read_text()
            # Sentences about tests that are not part of the series.
            text = re.sub(r"\n//! The [^.]* run\n//! on the host \([^.]*\.|"
                          r" The main tests [^(]*\(`tools/testing/host`\)\.|"
                          r" Host tests [^.]*\.", "", text)
            text = text.replace('#[path = "../host/src/paths.rs"]\n', "")
            for here, there in ("rust/vfio/", "rust/kernel/vfio/"), ("samples/", "samples/rust/"):
                text = text.replace(f'"../../../{here}', f'"../../../{there}')
            self.text[f"{KUNIT}/{name}"] = (
                intree.driver_source(text) if file.suffix == ".rs" else text)
        self.text[f"{KUNIT}/Makefile"] = KUNIT_MAKEFILE

    def add_suite(self):
        """Adds the selftests."""
        # The programs that break the device on purpose need this repository's own build,
        # the module answers no ioctl of a draft, and the tutorial is not in the series.
        # The list of expected failures is for a script that is not, either.
        own = {"draft", "mutations.txt", "run_mutants.sh", "note.c", "mtty_expected.txt"}
        for name in git(TOP, "ls-files", TESTS).split():
            file = TOP / name
            if own & {file.name, file.parent.name}:
                continue
            text = re.sub('\n?\n#include "draft/.*', "", file.read_text())
            if file.name == "Makefile":
                text = self.suite_makefile(text)
            elif file.name == "run_mock.sh":
                text = text.replace("; by default vfio_mock.ko at the top of the repository", "")
            elif file.name == "run_mtty.sh":
                text = re.sub(r"#\n# Some tests make mtty oops.*\n(#.*\n)*", "", text)
            self.suite.append(str(file.relative_to(TOP / TESTS)))
            self.text[name], self.mode[name] = text, file.stat().st_mode & 0o777
        header = TOP / "tools/testing/include/vfio_mock.h"
        self.suite.append(header.name)
        self.text[f"{TESTS}/{header.name}"] = header.read_text()

    @staticmethod
    def suite_makefile(text):
        """Returns the Makefile without the parts for use outside of a kernel tree."""
        text = re.sub(r"(?s)^(# SPDX[^\n]*\n).*?\nCFLAGS", r"\1CFLAGS", text)
        text = text.replace(" -I../../include", "").replace("../../include/", "")
        text = re.sub(
            r"(?s)\nifneq \(\$\(wildcard.*\nendif\n", "\ninclude ../lib.mk\n", text
        )
        for own in (" | $(OWN_HEADERS)", " run_mutants.sh", " draft/*"):
            text = text.replace(own, "")
        return text

    def format(self, source):
        """Formats the Rust files."""
        with tempfile.TemporaryDirectory() as temporary:
            paths = {path: Path(temporary) / path for path in self.text if path.endswith(".rs")}
            for path, file in paths.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self.text[path])
            rustfmt(source, paths.values())
            for path, file in paths.items():
                self.text[path] = file.read_text()


def without(text, absent, root=("self",)):
    """Returns a module without the declarations and imports of absent submodules of root."""
    size = len(root)

    def use(found):
        paths = [tuple(path) for path in intree.paths(found[2])]
        kept = [path for path in paths if path[:size] != root or path[size] not in absent]
        if len(kept) == len(paths):
            return found[0]
        tree = intree.Tree()
        for path in kept:
            tree.add(path)
        lines = ["\n".join(below.lines(name)) + ";\n" for name, below in tree.below.items()]
        return "".join(f"{found[1] or ''}use {line}" for line in lines)

    text = MOD.sub(lambda found: "" if found[1] in absent else found[0], text)
    return re.sub(r"\n{3,}", "\n\n", intree.USE.sub(use, text))


def only_modules(text, present):
    """Returns a module with nothing but the submodules that are present."""
    doc = re.search(r"^//!.*\n(//! .*\n)*", text, re.MULTILINE)
    mods = [found[0] for found in MOD.finditer(text) if found[1] in present]
    absent = {found[1] for found in MOD.finditer(text)} - set(present)
    uses = [use[0] for use in intree.USE.finditer(without(text, absent))
            if use[1] and intree.paths(use[2])[0][0] == "self"]
    # The condition of a macro for all modules.
    condition = re.search(r"supported! \{\s*(all\([^{]*\)) \{", text)
    if condition:
        mods = [f"#[cfg({condition[1]})]\n{mod}" for mod in mods]
    parts = [text.split("\n", 1)[0] + "\n", doc[0], "".join(mods), "".join(uses)]
    return "\n".join(part for part in parts if part)


def unfinished(text):
    """Returns the root without the description of modules to come."""
    lines = text.split("\n")
    docs = [n for n, line in enumerate(lines) if line.startswith("//!")]
    first = next(n for n in docs if lines[n] == "//!")
    headers = next(n for n in docs if lines[n].startswith("//! C headers"))
    lines[docs[-1] + 1 : docs[-1] + 1] = UNFINISHED
    del lines[first + 1 : headers]
    return "\n".join(lines)


def crate_path(module):
    """Returns the path of a module of the crate, or of its root."""
    return f"{CRATE}/{module}.rs" if module else f"{CRATE}.rs"


def declared(modules):
    """Returns modules of the crate with those that they are in."""
    return modules | {str(up) for one in modules for up in Path(one).parents} - {"."}


def grow_crate(tree, names):
    """Adds modules of the crate."""
    files = tree.files
    tree.modules |= set(names)
    there = declared(tree.modules)
    changed = []
    for name in ["", *sorted(there)]:
        path = crate_path(name)
        below = {child.rpartition("/")[2] for child in there if child.rpartition("/")[0] == name}
        text = files.text[path]
        if name and name not in tree.modules:
            text = only_modules(text, below)
        else:
            text = without(text, {found[1] for found in MOD.finditer(text)} - below)
        if name == "prelude":
            absent = {found[1] for found in MOD.finditer(files.text[f"{CRATE}.rs"])}
            text = without(text, absent - tree.modules, ("crate", "vfio"))
        if not name and set(files.crate) != tree.modules:
            text = unfinished(text)
        if not (tree.path / path).exists() or tree.read(path) != text:
            tree.write(path, text)
            changed.append(tree.path / path)
    rustfmt(tree.path, changed)


def is_complete(tree, name):
    """Is this file of the selftests there, and not only its start?"""
    path = f"{TESTS}/{name}"
    return (tree.path / path).exists() and tree.read(path) == tree.files.text.get(path)


def grow_makefile(tree):
    """Writes the Makefile of the selftests with the programs that are complete."""
    there = {name for name in tree.files.suite if is_complete(tree, name)}

    def variable(found):
        words = found[2].replace("\\\n", " ")
        # A function of make is one word.
        words = re.findall(r"\$\([^)]*\)|\S+", words)
        kept = [word for word in words
                if word[0] == "$" or word in there or f"{word}.c" in there]
        if kept == words:
            return found[0]
        return f"{found[1]} := {' '.join(kept)}\n" if kept else ""

    name = f"{TESTS}/Makefile"
    pattern = r"^(TEST_\w+|MIG_SRCS|LOCAL_HDRS) := ((?:.*\\\n)*.*)\n"
    tree.write(name, re.sub(pattern, variable, tree.files.text[name], flags=re.MULTILINE))


def grow_suite(tree, names):
    """Adds files of the selftests."""
    for name in names:
        path = f"{TESTS}/{name}"
        tree.write(path, tree.files.text[path], tree.files.mode.get(path, 0o644))
    main = f"{TESTS}/vfio_migration_test.c"
    if (tree.path / main).exists():
        text = tree.files.text[main]
        for part in re.findall(r'#include "(device/\w+\.c)"\n', text):
            if not is_complete(tree, part):
                text = text.replace(f'#include "{part}"\n', "")
        tree.write(main, text)
    if (tree.path / TESTS / "Makefile").exists():
        grow_makefile(tree)


def is_code(path, line):
    """Is this a line of code, and not blank, a comment or a document?"""
    line = line.strip()
    if not line or path.startswith("Documentation/") or path.endswith((".txt", ".rst")):
        return False
    if path.endswith((".c", ".h", ".rs")):
        return not line.startswith(("//", "/*", "* ", "*/")) and line != "*"
    return not line.startswith("#")


def code(path, text):
    """Returns the number of lines of code."""
    return sum(is_code(path, line) for line in text.split("\n"))


def starts(path, text):
    """Returns texts that each end after an item of a file, and are within the limit."""
    if code(path, text) <= LIMIT:
        return [text]
    lines = text.rstrip("\n").split("\n")
    ends = [n + 1 for n, line in enumerate(lines) if line in ("}", "};")] + [len(lines)]
    inner = [n + 1 for n, line in enumerate(lines) if line == "    }"]
    result, begin = [], 0
    while begin < len(lines):
        # An item that is too large, such as a module with tests, ends after one of its items.
        good = next(filter(None, ([
            end for end in some
            if end > begin and code(path, "\n".join(lines[begin:end])) <= LIMIT
        ] for some in (ends, inner))), None)
        if not good:
            sys.exit(f"{path}: no item ends within the limit after line {begin}")
        begin = good[-1]
        result.append("\n".join(lines[:begin]) + "\n")
    return result


def tests_of(text):
    """Returns the names of the tests of a program."""
    return re.findall(r"^TEST_F(?:_\w+)?\(\w+, (\w+)", text, re.MULTILINE)


@dataclasses.dataclass
class Patch:
    """A patch: its message, and a function that changes a tree."""

    message: str
    change: object

    def parts(self, _files):
        """Yields the patches that this one is posted as."""
        yield self


class Added(Patch):
    """A patch that adds files, in several parts if they are too large.

    The parts are files, or the starts of those. The files are not built before the last one.
    """

    def __init__(self, message, change, patterns):
        super().__init__(message, change)
        self.patterns = patterns

    def parts(self, files):
        paths = files.match(self.patterns)
        if sum(code(path, files.text[path]) for path in paths) <= LIMIT:
            yield self
            return
        writes = [(path, text) for path in paths for text in starts(path, files.text[path])]
        before = 0
        for number, (path, text) in enumerate(writes, 1):
            last = number == len(writes)
            tests = tests_of(text)
            more = f"The tests from {tests[before]} to {tests[-1]}. " if tests[before:] else ""
            more += "" if last else "It is not built before the last part."
            before = len(tests)
            yield Patch(
                numbered(self.message, number, len(writes), more),
                self.change if last else lambda tree, path=path, text=text: tree.write(path, text),
            )


def numbered(message, number, count, more):
    """Returns the message of a part of a patch."""
    subject, _, body = message.strip().partition("\n\n")
    more = textwrap.fill(more, 74)
    return f"{subject}, part {number} of {count}\n\n{body}\n\n{more}"


def diff(name):
    """A patch to files of the kernel, which has its message."""
    head, mark, text = (HERE / name).read_text().partition("diff --git")
    return Patch(
        head.partition("\n")[2],
        lambda tree: git(tree.path, "apply", "-", input=mark + text),
    )


def suite(message, *names):
    """A patch that adds selftests."""
    return Added(
        message, lambda tree: grow_suite(tree, names), [f"{TESTS}/{name}" for name in names]
    )


def crate(message, *names, also=None):
    """A patch that adds modules of the crate; `also` changes other files."""

    def change(tree):
        grow_crate(tree, names)
        if also:
            also(tree)

    return Added(message, change, [f"{CRATE}/{name}.rs" for name in names])


def sample(message, name, *patterns, what=None):
    """A patch that adds files of a driver; the last one says what its device is."""

    def change(tree):
        for path in tree.files.match(patterns):
            tree.write(path, tree.files.text[path])
        if what:
            add_sample(tree, name, what)

    return Added(message, change, patterns)


def add_sample(tree, name, what):
    """Adds the entries of a sample in Kconfig, Makefile and MAINTAINERS."""
    option = f"SAMPLE_RUST_VFIO_{name.upper()}"
    folder = (tree.path / f"samples/rust/vfio_{name}").is_dir()
    target = f"vfio_{name}/" if folder else f"vfio_{name}.o"
    lines = tree.read("samples/rust/Makefile").split("\n")
    others = [n for n, line in enumerate(lines) if line.startswith("obj-$(CONFIG_SAMPLE_")]
    lines.insert(others[-1] + 1, f"obj-$(CONFIG_{option})\t\t+= {target}")
    tree.write("samples/rust/Makefile", "\n".join(lines))
    kconfig = f"""\
config {option}
	tristate "{name.capitalize()} migratable VFIO device"
	depends on RUST_VFIO_ABSTRACTIONS && PCI
	help
	  This option builds the driver of {what}.

	  To compile this as a module, choose M here:
	  the module will be called vfio_{name}.

	  If unsure, say N.

"""
    tree.insert("samples/rust/Kconfig", "config SAMPLE_RUST_HOSTPROGS", kconfig, before=True)
    tree.maintain(RUST, f"samples/rust/vfio_{name}{'/' if folder else '.rs'}")


def without_suites(text, absent):
    """Returns the root of the KUnit tests without some suites and their modules."""
    text = SUITE_OF_TESTS.sub(lambda found: "" if found[1] in absent else found[0], text)
    text = re.sub(r'^#\[path = "[^"]*"\]\npub mod (\w+);\n',
                  lambda found: "" if found[1] in absent else found[0], text, flags=re.MULTILINE)
    return text.rstrip() + "\n"


def kunit_root(tree, absent):
    """Writes the root of the KUnit tests."""
    path = f"{KUNIT}/vfio_kunit_main.rs"
    tree.write(path, without_suites(tree.files.text[path], absent))


def kunit(message, *names, absent=None):
    """A patch that adds files of the KUnit tests; the last one adds the module."""

    def change(tree):
        for name in names:
            path = f"{KUNIT}/{name}"
            tree.write(path, tree.files.text[path])
        if absent is not None:
            kunit_root(tree, absent)
            add_kunit(tree)

    return Added(message, change, [f"{KUNIT}/{name}" for name in names])


def add_kunit(tree):
    """Adds the entries of the KUnit tests in Kconfig, Makefile and MAINTAINERS."""
    kconfig = """\
config RUST_VFIO_KUNIT_TEST
	tristate "KUnit tests of the Rust VFIO abstractions" if !KUNIT_ALL_TESTS
	depends on RUST_VFIO_ABSTRACTIONS && KUNIT=y
	default KUNIT_ALL_TESTS
	help
	  This builds KUnit tests of the migration engine, with a device
	  that is not on a bus, and of other parts of the abstractions.
	  They run when the module is loaded, which is called
	  vfio_kunit.

	  If unsure, say N.

"""
    tree.insert("drivers/vfio/Kconfig", 'source "drivers/vfio/pci/Kconfig"', kconfig, before=True)
    tree.insert(
        "drivers/vfio/Makefile",
        "obj-$(CONFIG_RUST_VFIO_ABSTRACTIONS) += rust_trace.o",
        "obj-$(CONFIG_RUST_VFIO_KUNIT_TEST) += kunit/",
    )
    tree.maintain(RUST, f"{KUNIT}/")
