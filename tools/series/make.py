#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Lay this repository into a kernel tree as a series of patches.

    make.py KSRC FOLDER

KSRC is the source of Linux 7.3, which is not changed. FOLDER receives the
patches. Each is a step of its own: the tree builds after it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import intree

TOP = Path(__file__).resolve().parents[2]
# What an out-of-tree crate needs besides, and does not travel.
SCAFFOLD = ("bindings", intree.SCAFFOLD)
MAINTAINERS = "VFIO ABSTRACTIONS AND SAMPLES [RUST]"


class Step:
    """One patch under way: the tree as it is before it, and what it adds."""

    def __init__(self, tree):
        self.tree = tree
        self.files = []

    def read(self, path):
        """A file of the kernel tree, as the steps before left it."""
        return (self.tree / path).read_text()

    def write(self, path, text, mode=0o644):
        """A whole file."""
        file = self.tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def insert(self, path, after, text, before=False):
        """Lines behind the one line that is `after`."""
        lines = self.read(path).split("\n")
        if lines.count(after) != 1:
            sys.exit(f"{path} has not one line {after!r}: is this Linux 7.3?")
        at = lines.index(after) + (not before)
        lines[at:at] = text.split("\n")[: -1 if text.endswith("\n") else None]
        self.write(path, "\n".join(lines))

    def sort_in(self, path, text, among):
        """A line where the order of the lines that match `among` has it."""
        lines = self.read(path).split("\n")
        others = [n for n, line in enumerate(lines) if re.match(among, line)]
        at = next((n for n in others if lines[n] > text), others[-1] + 1)
        lines.insert(at, text)
        self.write(path, "\n".join(lines))

    def maintain(self, *patterns):
        """The patterns in the entry of MAINTAINERS, which is made if need be."""
        text = self.read("MAINTAINERS")
        if MAINTAINERS not in text:
            who = git(self.tree, "var", "GIT_COMMITTER_IDENT").rsplit(" ", 2)[0]
            entry = (
                f"{MAINTAINERS}\nM:\t{who}\nL:\tkvm@vger.kernel.org\n"
                "L:\trust-for-linux@vger.kernel.org\nS:\tMaintained\n\n"
            )
            names = re.finditer(r"^(VFIO [^\n]*)\nM:", text, re.MULTILINE)
            first = next(name for name in names if name[1] > MAINTAINERS)
            text = text[: first.start()] + entry + text[first.start() :]
        start = text.index(f"{MAINTAINERS}\n")
        end = text.index("\n\n", start)
        head, *files = text[start:end].split("\nF:\t")
        folders = tuple(pattern for pattern in patterns if pattern.endswith("/"))
        files = {file for file in files if not folders or not file.startswith(folders)}
        files = sorted({*files, *patterns})
        entry = "\nF:\t".join([head, *files])
        self.write("MAINTAINERS", text[:start] + entry + text[end:])


def git(tree, *arguments, **options):
    """What git says in a tree."""
    return subprocess.run(
        ["git", "-C", tree, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    ).stdout.strip()


def rustfmt(tree, files):
    """Formats files as the kernel does."""
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


def crate_files(names):
    """The sources of modules of the crate, relative to it."""
    crate = TOP / "rust/vfio"
    for name in names:
        yield Path(f"{name}.rs")
        for file in sorted((crate / name).glob("*.rs")):
            yield file.relative_to(crate)


def modules():
    """The modules that the root of the crate names, with their visibility."""
    text = (TOP / "rust/vfio/lib.rs").read_text()
    found = re.findall(r"^(pub )?mod (\w+);$", text, re.MULTILINE)
    return {name: f"{pub}mod {name};" for pub, name in found if name not in SCAFFOLD}


def engine_modules():
    """The modules that the migration engine is made of: what it refers to."""
    found, todo = set(), ["migration"]
    while todo:
        found.add(name := todo.pop())
        for file in crate_files([name]):
            text = intree.without_comments((TOP / "rust/vfio" / file).read_text())
            paths = [
                path
                for use in intree.USE.finditer(text)
                for path in intree.paths(use[2])
            ]
            names = {path[1] for path in paths if path[0] == "crate" and len(path) > 1}
            names |= set(re.findall(r"\bcrate::(\w+)", text))
            todo += [n for n in names if n in modules() and n not in found]
    return [name for name in modules() if name in found]


def root(names):
    """The root of the module with these modules in it, or all."""
    text = (TOP / "rust/vfio/lib.rs").read_text()
    text = re.sub(r'#\[path = "[^"]*"\]\nmod \w+;\n+', "", text)
    for name, line in modules().items():
        if names is not None and name not in names:
            text = text.replace(f"{line}\n", "")
    if names is not None:
        # What the page tells is not there before all modules are.
        lines = text.split("\n")
        docs = [n for n, line in enumerate(lines) if line.startswith("//!")]
        first = next(n for n in docs if lines[n] == "//!")
        headers = next(n for n in docs if lines[n].startswith("//! C headers"))
        attribute = '#![expect(dead_code, reason = "the emulated devices to come use it")]'
        lines[docs[-1] + 1 : docs[-1] + 1] = ["", attribute]
        del lines[first + 1 : headers]
        text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", intree.crate_source(text))


def add_modules(step, names):
    """Modules of the crate, and the root that has them."""
    whole = {*names, *engine_modules()} == set(modules())
    step.write("rust/kernel/vfio.rs", root(None if whole else names))
    files = ["rust/kernel/vfio.rs"]
    for file in crate_files(names):
        text = (TOP / "rust/vfio" / file).read_text()
        step.write(f"rust/kernel/vfio/{file}", intree.crate_source(text))
        files.append(f"rust/kernel/vfio/{file}")
    rustfmt(step.tree, [step.tree / file for file in files])
    return files


def bindings(step):
    """rust: bindings: add the headers of VFIO and of mediated devices

    Abstractions for VFIO drivers need struct vfio_device and its operations,
    the bus of mediated devices, and anonymous inodes for the file that
    carries a device's state in a migration; and helpers for what bindgen
    cannot bind. With CONFIG_CFI an enum in the prototype of a callback is a
    type of its own.
    """
    text = (TOP / "rust/bindings/vfio_bindings.h").read_text()
    for include in re.findall(r"^#include <linux/.*", text, re.MULTILINE):
        step.sort_in(
            "rust/bindings/bindings_helper.h",
            include,
            r"#include <linux/(?!hrtimer_types|acpi|gpu_buddy)",
        )
    text = (TOP / "rust/helpers/vfio.c").read_text()
    text = re.sub(r'#include (<linux/module.h>|"vfio.h")\n|\n/\* sparse (.*\n)*', "", text)
    step.write("rust/helpers/vfio.c", re.sub(r"\n{3,}", "\n\n", text))
    step.sort_in("rust/helpers/helpers.c", '#include "vfio.c"', r'#include "[e-z]')
    kbuild = (TOP / "Kbuild").read_text()
    enums = re.findall(r"--newtype-enum (\w+) .*\n.*-enum=\1='\\(.*)' ", kbuild)
    for name, encoding in enums:
        step.insert(
            "rust/bindgen_parameters",
            "--newtype-enum lru_status",
            f"--newtype-enum {name}\n"
            f"--with-attribute-custom-enum={name}='{encoding}'\n",
            before=True,
        )
    step.maintain("rust/helpers/vfio.c")


def engine(step):
    """rust: vfio: add the migration engine

    Each driver of a migratable VFIO device has the same six hundred lines:
    the walk through the states of the migration uAPI, the file that carries
    the state, the end-of-stream rules of pre-copy, poll, reset and close at
    any time. Most get a part of it wrong.

    Have them once. A driver says how its device stops, saves and loads; the
    engine owns states, sessions and files. It asks for nothing but a struct
    vfio_device, so that drivers of real devices can use it as well as
    emulated ones.
    """
    step.insert(
        "drivers/vfio/Kconfig",
        KCONFIG_BEFORE,
        KCONFIG,
        before=True,
    )
    step.insert(
        "rust/kernel/lib.rs",
        "pub mod workqueue;",
        "#[cfg(CONFIG_RUST_VFIO_ABSTRACTIONS)]\npub mod vfio;",
        before=True,
    )
    step.maintain(*add_modules(step, engine_modules()))


KCONFIG_BEFORE = 'source "drivers/vfio/pci/Kconfig"'
KCONFIG = """\
config RUST_VFIO_ABSTRACTIONS
	bool "Rust VFIO abstractions"
	depends on RUST && VFIO=y
	depends on EVENTFD && SYSFS && 64BIT
	select IOMMUFD_DRIVER if IOMMUFD
	select VFIO_MDEV
	help
	  This enables the Rust abstractions for VFIO drivers: emulated
	  devices on the bus of mediated devices, and the engine that
	  migrates them, which drivers of other devices can use as well.

	  If unsure, say N.

"""


def emulated(step):
    """rust: vfio: add emulated PCI devices and mediated devices

    A device that is made of software needs regions, interrupts, the
    configuration space of a PCI function and a bus on which the
    administrator creates it. Add them beside the migration engine, so that
    a whole driver is safe code and short.
    """
    there = engine_modules()
    add_modules(step, [name for name in modules() if name not in there])
    step.maintain("rust/kernel/vfio.rs", "rust/kernel/vfio/")


def minimal(step):
    """samples: rust: add a minimal migratable VFIO driver

    For who writes a driver on the abstractions, to copy: one file, all
    states of the migration uAPI, and the tracking of what has changed.
    """
    path = "samples/rust/vfio_minimal.rs"
    text = (TOP / "samples/vfio_minimal/vfio_minimal.rs").read_text()
    step.write(path, intree.driver_source(text))
    rustfmt(step.tree, [step.tree / path])
    add_sample(step, "minimal", "vfio_minimal.o", "64 KiB of memory")
    step.maintain(path)


def mock(step):
    """samples: rust: add a mock migratable VFIO device

    Live migration of devices is tested by few, as the hardware is rare. Add
    a device that needs none: a PCI endpoint with state memory of up to
    1 GiB, dirty tracking by page, pre-copy with all of its end-of-stream
    rules, and registers that make it slow or busy. Whoever works on a
    virtual machine monitor can migrate it.
    """
    folder = "samples/rust/vfio_mock"
    files = []
    for file in sorted((TOP / "samples/vfio_mock").rglob("*.rs")):
        name = file.relative_to(TOP / "samples/vfio_mock")
        name = Path("vfio_mock.rs") if str(name) == "main.rs" else name
        step.write(f"{folder}/{name}", intree.driver_source(file.read_text()))
        files.append(step.tree / folder / name)
    rustfmt(step.tree, files)
    step.write(
        f"{folder}/Makefile",
        "# SPDX-License-Identifier: GPL-2.0\n\n"
        "obj-$(CONFIG_SAMPLE_RUST_VFIO_MOCK) += vfio_mock.o\n",
    )
    add_sample(
        step, "mock", "vfio_mock/", "registers, interrupts, DMA and state memory"
    )
    step.maintain(f"{folder}/")


def add_sample(step, name, target, what):
    """The entries of a sample in Kconfig and Makefile."""
    option = f"SAMPLE_RUST_VFIO_{name.upper()}"
    lines = step.read("samples/rust/Makefile").split("\n")
    others = [
        n for n, line in enumerate(lines) if line.startswith("obj-$(CONFIG_SAMPLE_")
    ]
    lines.insert(others[-1] + 1, f"obj-$(CONFIG_{option})\t\t+= {target}")
    step.write("samples/rust/Makefile", "\n".join(lines))
    kconfig = f"""\
config {option}
	tristate "{name.capitalize()} migratable VFIO device"
	depends on RUST_VFIO_ABSTRACTIONS
	help
	  This option builds the driver of a mediated device that can be
	  live-migrated and is made of software: {what}.

	  To compile this as a module, choose M here:
	  the module will be called vfio_{name}.

	  If unsure, say N.

"""
    step.insert(
        "samples/rust/Kconfig", "config SAMPLE_RUST_HOSTPROGS", kconfig, before=True
    )


def selftests(step):
    """selftests: vfio_migration: test migratable VFIO devices

    Hold any migratable VFIO device against the migration uAPI: its states
    and the paths between them, the files that carry the state, the rules
    for the end of the stream, and what must fail. Test vfio_mock in
    addition for what only it promises, such as its stream format.
    """
    here = "tools/testing/selftests/vfio_migration"
    # What breaks the device on purpose needs this repository's own build.
    own = ("mutations.txt", "run_mutants.sh")
    for file in sorted((TOP / here).iterdir()):
        if file.name in own:
            continue
        if file.name in git(TOP, "ls-files", here).replace(f"{here}/", "").split():
            text = file.read_text()
            if file.name == "Makefile":
                text = selftest_makefile(text)
            elif file.name == "run_mock.sh":
                text = text.replace(
                    "; by default vfio_mock.ko at the top of the repository", ""
                )
            step.write(f"{here}/{file.name}", text, file.stat().st_mode & 0o777)
    header = (TOP / "tools/testing/include/vfio_mock.h").read_text()
    step.write(f"{here}/vfio_mock.h", header)
    step.sort_in(
        "tools/testing/selftests/Makefile",
        "TARGETS += vfio_migration",
        r"TARGETS \+= [u-z]",
    )
    step.maintain(f"{here}/")


def selftest_makefile(text):
    """The Makefile without what is for use outside of the kernel tree."""
    text = re.sub(r"(?s)^(# SPDX[^\n]*\n).*?\nCFLAGS", r"\1CFLAGS", text)
    text = text.replace(" -I../../include", "").replace("../../include/", "")
    text = re.sub(
        r"(?s)\nifneq \(\$\(wildcard.*\nendif\n", "\ninclude ../lib.mk\n", text
    )
    return text.replace(" | $(OWN_HEADERS)", "").replace(" run_mutants.sh", "")


def documents(step):
    """Documentation: driver-api: describe the mock migratable VFIO device

    Registers, migration and stream format of vfio_mock, for its users and
    for those who write a driver like it, and what it has in sysfs.
    """
    text = (TOP / "Documentation/vfio_mock.rst").read_text()
    # What only the tests of the documents read.
    text = re.sub(r"^ *\.\. (setup|run): .*\n+", "", text, flags=re.MULTILINE)
    # What is about programs that do not travel.
    text = re.sub(
        r"(?ms)^(Virtual machine monitors|Speed)\n=+\n.*?(?=^[^\n]+\n=+\n)", "", text
    )
    text = re.sub(r"(?m)^(.+\n)*.*``make demo.*\n(.+\n)*\n", "", text)
    abi = "Documentation/ABI/testing/sysfs-vfio_mock"
    step.write(abi, (TOP / abi).read_text())
    step.write("Documentation/driver-api/vfio-mock.rst", text)
    step.insert("Documentation/driver-api/index.rst", "   vfio", "   vfio-mock")
    step.maintain(abi, "Documentation/driver-api/vfio-mock.rst")


STEPS = (bindings, engine, emulated, minimal, mock, selftests, documents)


def base(source, tree):
    """The files that the steps change, as a repository of their own."""
    changed = (
        ".rustfmt.toml",
        "Documentation/driver-api/index.rst",
        "MAINTAINERS",
        "drivers/vfio/Kconfig",
        "rust/bindgen_parameters",
        "rust/bindings/bindings_helper.h",
        "rust/helpers/helpers.c",
        "rust/kernel/lib.rs",
        "samples/rust/Kconfig",
        "samples/rust/Makefile",
        "tools/testing/selftests/Makefile",
    )
    for path in changed:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, tree / path)
    git(tree, "init", "--quiet")
    # Who makes the series is who works on this repository.
    for key in ("user.name", "user.email"):
        git(tree, "config", key, git(TOP, "config", key))
    commit(tree, "base")


def commit(tree, message):
    """All that has changed, as one commit."""
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--signoff", "--no-verify", "-F", "-", input=message)


def main():
    """Writes the series."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if not (source / "rust/kernel/lib.rs").is_file():
        sys.exit(f"{source} is no kernel source with Rust")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.patch"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        base(source, tree)
        for make in STEPS:
            make(Step(tree))
            commit(tree, re.sub(r"^    ", "", make.__doc__, flags=re.MULTILINE))
        first = f"HEAD~{len(STEPS)}.."
        git(tree, "format-patch", "--quiet", "-o", folder.resolve(), first)
    print(*sorted(folder.glob("*.patch")), sep="\n")


if __name__ == "__main__":
    main()
