#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Make a series of patches that adds this repository to a kernel tree.

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
# Modules that only an out-of-tree crate needs.
SCAFFOLD = ("bindings", intree.SCAFFOLD)
MAINTAINERS = "VFIO ABSTRACTIONS AND SAMPLES [RUST]"


class Step:
    """One patch: the tree before it, and its changes."""

    def __init__(self, tree):
        self.tree = tree
        self.files = []

    def read(self, path):
        """Returns a file of the tree after the previous steps."""
        return (self.tree / path).read_text()

    def write(self, path, text, mode=0o644):
        """Writes a file."""
        file = self.tree / path
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

    def maintain(self, *patterns):
        """Adds the patterns to the entry in MAINTAINERS, which is created if missing."""
        text = self.read("MAINTAINERS")
        if MAINTAINERS not in text:
            maintainer = git(self.tree, "var", "GIT_COMMITTER_IDENT").rsplit(" ", 2)[0]
            entry = (
                f"{MAINTAINERS}\nM:\t{maintainer}\nL:\tkvm@vger.kernel.org\n"
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


def crate_files(names):
    """Yields the sources of modules of the crate, relative to it."""
    crate = TOP / "rust/vfio"
    for name in names:
        yield Path(f"{name}.rs")
        for file in sorted((crate / name).rglob("*.rs")):
            yield file.relative_to(crate)


def modules():
    """Returns the modules of the crate with their declarations."""
    text = (TOP / "rust/vfio/lib.rs").read_text()
    found = re.findall(r"^(pub )?mod (\w+);$", text, re.MULTILINE)
    return {name: f"{pub}mod {name};" for pub, name in found if name not in SCAFFOLD}


def engine_modules():
    """Returns the modules that the migration engine uses."""
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
    """Returns the root of the module with these modules, or with all."""
    text = (TOP / "rust/vfio/lib.rs").read_text()
    text = re.sub(r'#\[path = "[^"]*"\]\nmod \w+;\n+', "", text)
    for name, line in modules().items():
        if names is not None and name not in names:
            text = re.sub(rf"^(#\[cfg\(\w+\)\]\n)?{line}\n", "", text, flags=re.MULTILINE)
    if names is not None:
        # The page describes all modules, so leave it out until all are added.
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
    """Adds modules of the crate and updates its root."""
    whole = {*names, *engine_modules()} == set(modules())
    step.write("rust/kernel/vfio.rs", root(None if whole else names))
    files = ["rust/kernel/vfio.rs"]
    for file in crate_files(names):
        text = (TOP / "rust/vfio" / file).read_text()
        step.write(f"rust/kernel/vfio/{file}", intree.crate_source(text))
        files.append(f"rust/kernel/vfio/{file}")
    rustfmt(step.tree, [step.tree / file for file in files])
    return files


def from_patch(name, *patterns):
    """Returns the step of a patch to files of the kernel, with its message."""
    head, mark, diff = (TOP / "tools/series" / name).read_text().partition("diff --git")

    def step_of_patch(step):
        git(step.tree, "apply", "-", input=mark + diff)
        if patterns:
            step.maintain(*patterns)

    step_of_patch.__doc__ = head.partition("\n")[2].strip()
    return step_of_patch


CONSTANT_BEFORE = "const fop_flags_t RUST_CONST_HELPER_FOP_UNSIGNED_OFFSET = FOP_UNSIGNED_OFFSET;"


def bindings(step):
    """rust: bindings: add the headers of VFIO and of mediated devices

    Abstractions for VFIO drivers need struct vfio_device and its operations,
    the bus of mediated devices, and anonymous inodes for the file that
    carries a device's state in a migration; and constants and helpers for
    what bindgen cannot bind. With CONFIG_CFI an enum in the prototype of a
    callback is a type of its own.
    """
    text = (TOP / "rust/bindings/vfio_bindings.h").read_text()
    constants = re.findall(r"^const .*", text, re.MULTILINE)
    helper = "rust/bindings/bindings_helper.h"
    step.insert(helper, CONSTANT_BEFORE, "\n".join(constants))
    for include in re.findall(r"^#include <linux/.*", text, re.MULTILINE):
        step.sort_in(
            helper, include, r"#include <linux/(?!hrtimer_types|acpi|gpu_buddy)"
        )
    text = (TOP / "rust/helpers/vfio.c").read_text()
    text = re.sub(r'#include (<linux/module.h>|"vfio.h")\n|\n/\* sparse (.*\n)*', "", text)
    # They exist only with CONFIG_RUST_VFIO_ABSTRACTIONS, which the next step adds.
    text = text.replace('#include "vfio_trace.h"', "#include <trace/events/vfio_migration.h>")
    start = text.index("/* The tracepoints")
    text = f"{text[:start]}#ifdef CONFIG_RUST_VFIO_ABSTRACTIONS\n{text[start:].rstrip()}\n#endif\n"
    step.write("rust/helpers/vfio.c", re.sub(r"\n{3,}", "\n\n", text))
    text = (TOP / "rust/helpers/vfio_trace.h").read_text()
    text = re.sub(r"#undef TRACE_INCLUDE_.*\n|#define TRACE_INCLUDE_.*\n", "", text)
    text = text.replace(" Each module that the crate is linked into has\n * its own, in a system with the name of the module.", "")
    text = text.replace("VFIO_TRACE_SYSTEM", "vfio_migration")
    text = text.replace("RUST_HELPERS_VFIO_TRACE_H", "_TRACE_VFIO_MIGRATION_H")
    step.write("include/trace/events/vfio_migration.h", text)
    step.sort_in("rust/helpers/helpers.c", '#include "vfio.c"', r'#include "[e-z]')
    kbuild = (TOP / "rust/vfio.mk").read_text()
    enums = re.findall(r"--newtype-enum (\w+) .*\n.*-enum=\1='\\(.*)' ", kbuild)
    for name, encoding in enums:
        step.insert(
            "rust/bindgen_parameters",
            "--newtype-enum lru_status",
            f"--newtype-enum {name}\n"
            f"--with-attribute-custom-enum={name}='{encoding}'\n",
            before=True,
        )
    step.maintain("rust/helpers/vfio.c", "include/trace/events/vfio_migration.h")


def engine(step):
    """rust: vfio: add the migration engine

    Each driver of a migratable VFIO device has the same six hundred lines:
    the state machine of the migration uAPI, the file for the device state,
    the end-of-stream rules of pre-copy, poll, and reset and close at any
    time. Most drivers get a part of it wrong.

    Implement this once. A driver stops, saves and loads its device; the
    engine has states, sessions and files. It needs nothing but a struct
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
    step.insert(
        "drivers/vfio/Makefile",
        "vfio-$(CONFIG_VFIO_DEBUGFS) += debugfs.o",
        "\nobj-$(CONFIG_RUST_VFIO_ABSTRACTIONS) += rust_trace.o",
    )
    text = (TOP / "rust/helpers/vfio_trace.c").read_text()
    text = text.replace('"vfio_trace.h"', "<trace/events/vfio_migration.h>")
    text = text.replace(
        "Defines the tracepoints of a module. VFIO_TRACE_SYSTEM is the name of the module.",
        "Defines the tracepoints of drivers in Rust.",
    )
    step.write("drivers/vfio/rust_trace.c", text)
    step.maintain("drivers/vfio/rust_trace.c")
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
	  devices, as mediated devices or PCI functions, and the engine
	  that migrates them, which drivers of other devices can use as
	  well.

	  If unsure, say N.

"""


def emulated(step):
    """rust: vfio: add emulated PCI devices and variant drivers

    A software device needs regions, interrupts, the configuration space
    of a PCI function and a bus on which the administrator creates it:
    that of mediated devices, or one of PCI functions behind a software
    IOMMU. A variant driver of a real device needs vfio_pci_core, and
    access to the device that excludes resets. Add them beside the
    migration engine, so that a whole driver is safe code and short.
    """
    there = engine_modules()
    add_modules(step, [name for name in modules() if name not in there])
    step.maintain("rust/kernel/vfio.rs", "rust/kernel/vfio/")


def minimal(step):
    """samples: rust: add a minimal migratable VFIO driver

    A template for driver authors in one file, with all states of the
    migration uAPI and dirty tracking.
    """
    path = "samples/rust/vfio_minimal.rs"
    text = (TOP / "samples/vfio_minimal/vfio_minimal.rs").read_text()
    step.write(path, intree.driver_source(text))
    rustfmt(step.tree, [step.tree / path])
    add_sample(step, "minimal", "vfio_minimal.o", "64 KiB of memory")
    step.maintain(path)


def mock(step):
    """samples: rust: add a mock migratable VFIO device

    Few projects test live migration of devices, because the hardware is
    rare. Add a device that needs none: a PCI function with state memory of
    up to 1 GiB, dirty tracking by page, pre-copy with all of its
    end-of-stream rules, and registers that make it slow or busy. Developers
    of virtual machine monitors can migrate it.
    """
    add_folder(step, "mock", "registers, interrupts, DMA and state memory")


def firmware(step):
    """samples: rust: add a migratable VFIO driver for a device with firmware

    The state of many devices is accessible to their firmware alone, which
    saves and loads it in bulk, takes time, and fails. Add a template for
    drivers of such devices, with a simulation of one. It handles each failure
    of the firmware, and waits for the firmware without delaying other tasks.
    """
    add_folder(step, "fw", "memory that simulated firmware saves and loads")


def add_folder(step, name, what):
    """A sample with a folder of its own."""
    module = f"vfio_{name}"
    folder = f"samples/rust/{module}"
    files = []
    for file in sorted((TOP / "samples" / module).rglob("*.rs")):
        path = file.relative_to(TOP / "samples" / module)
        path = Path(f"{module}.rs") if str(path) == "main.rs" else path
        step.write(f"{folder}/{path}", intree.driver_source(file.read_text()))
        files.append(step.tree / folder / path)
    rustfmt(step.tree, files)
    step.write(
        f"{folder}/Makefile",
        "# SPDX-License-Identifier: GPL-2.0\n\n"
        f"obj-$(CONFIG_SAMPLE_RUST_VFIO_{name.upper()}) += {module}.o\n",
    )
    add_sample(step, name, f"{module}/", what)
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
	depends on RUST_VFIO_ABSTRACTIONS && PCI
	help
	  This option builds the driver of a device that can be
	  live-migrated and has no hardware: {what}.

	  To compile this as a module, choose M here:
	  the module will be called vfio_{name}.

	  If unsure, say N.

"""
    step.insert(
        "samples/rust/Kconfig", "config SAMPLE_RUST_HOSTPROGS", kconfig, before=True
    )


def selftests(step):
    """selftests: vfio_migration: test migratable VFIO devices

    Test that a migratable VFIO device conforms to the migration uAPI: its
    states and the paths between them, the files for the device state, the
    end-of-stream rules, and errors. Test additional features of vfio_mock,
    such as its stream format.
    """
    here = "tools/testing/selftests/vfio_migration"
    # What breaks the device on purpose needs this repository's own build, the module
    # answers no ioctl of a draft, and the tutorial is not part of the series.
    own = ("draft", "mutations.txt", "run_mutants.sh", "note.c")
    for name in git(TOP, "ls-files", here).split():
        file = TOP / name
        if {file.name, file.parent.name} & set(own):
            continue
        text = re.sub('\n?\n#include "draft/.*', "", file.read_text())
        text = re.sub(r"(?m)^skips .*\n\t.*\n  \w*draft\w*\n\n", "", text)
        if file.name == "Makefile":
            text = selftest_makefile(text)
        elif file.name == "run_mock.sh":
            text = text.replace("; by default vfio_mock.ko at the top of the repository", "")
        step.write(name, text, file.stat().st_mode & 0o777)
    header = (TOP / "tools/testing/include/vfio_mock.h").read_text()
    step.write(f"{here}/vfio_mock.h", header)
    step.sort_in(
        "tools/testing/selftests/Makefile",
        "TARGETS += vfio_migration",
        r"TARGETS \+= [u-z]",
    )
    step.maintain(f"{here}/")


def selftest_makefile(text):
    """Returns the Makefile without the parts for use outside of a kernel tree."""
    text = re.sub(r"(?s)^(# SPDX[^\n]*\n).*?\nCFLAGS", r"\1CFLAGS", text)
    text = text.replace(" -I../../include", "").replace("../../include/", "")
    text = re.sub(
        r"(?s)\nifneq \(\$\(wildcard.*\nendif\n", "\ninclude ../lib.mk\n", text
    )
    for own in (" | $(OWN_HEADERS)", " run_mutants.sh", " draft/*"):
        text = text.replace(own, "")
    return text


def documents(step):
    """Documentation: driver-api: describe the mock migratable VFIO device

    Describe the registers, the migration and the stream format of
    vfio_mock, for its users and for authors of similar drivers, and its
    files in sysfs and configfs.
    """
    text = (TOP / "Documentation/vfio_mock.rst").read_text()
    # Comments for the tests of the documents.
    text = re.sub(r"^ *\.\. (setup|run): .*\n+", "", text, flags=re.MULTILINE)
    # Sections about programs that are not part of the series.
    text = re.sub(
        r"(?ms)^(Virtual machine monitors|Speed)\n=+\n.*?(?=^[^\n]+\n=+\n)", "", text
    )
    text = re.sub(r"(?m)^(.+\n)*.*``make demo.*\n(.+\n)*\n", "", text)
    abi = [f"Documentation/ABI/testing/{fs}-vfio_mock" for fs in ("configfs", "sysfs")]
    for file in abi:
        step.write(file, (TOP / file).read_text())
    step.write("Documentation/driver-api/vfio-mock.rst", text)
    step.insert("Documentation/driver-api/index.rst", "   vfio", "   vfio-mock")
    step.maintain(*abi, "Documentation/driver-api/vfio-mock.rst")


STEPS = (
    from_patch("libvfio.patch"),
    *(from_patch(path) for path in sorted((TOP / "tools/series/mtty").glob("*.patch"))),
    from_patch("pci_remove.patch"),
    bindings,
    engine,
    emulated,
    minimal,
    firmware,
    mock,
    selftests,
    from_patch(
        "libvfio_mock.patch", "tools/testing/selftests/vfio/lib/drivers/vfio_mock/"
    ),
    documents,
)


def base(source, tree):
    """Creates a repository with the files that the steps change."""
    changed = (
        ".rustfmt.toml",
        "Documentation/driver-api/index.rst",
        "MAINTAINERS",
        "drivers/pci/pci-sysfs.c",
        "drivers/vfio/Kconfig",
        "drivers/vfio/Makefile",
        "rust/bindgen_parameters",
        "rust/bindings/bindings_helper.h",
        "rust/helpers/helpers.c",
        "rust/kernel/lib.rs",
        "samples/rust/Kconfig",
        "samples/rust/Makefile",
        "samples/vfio-mdev/mtty.c",
        "tools/testing/selftests/Makefile",
        "tools/testing/selftests/vfio/lib/libvfio.c",
        "tools/testing/selftests/vfio/lib/libvfio.mk",
        "tools/testing/selftests/vfio/lib/vfio_pci_driver.c",
    )
    for path in changed:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, tree / path)
    git(tree, "init", "--quiet")
    # Use the identity of this repository, by default that of its last author.
    for key, author in (("user.name", "%an"), ("user.email", "%ae")):
        last = git(TOP, "log", "-1", f"--format={author}")
        git(tree, "config", key, git(TOP, "config", "--default", last, "--get", key))
    commit(tree, "base")


def commit(tree, message):
    """Commits all changes."""
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--signoff", "--no-verify", "-F", "-", input=message)


def main():
    """Writes the series."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if not (source / "rust/kernel/lib.rs").is_file():
        sys.exit(f"{source} is not a kernel source with Rust")
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
