# SPDX-License-Identifier: GPL-2.0
"""Builds the initramfs of the demo's guests: /init and the modules it loads."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "guest.c", HERE / "display.c", HERE / "peers.c")
HEADERS = (HERE / "guest.h", HERE.parent / "include" / "vfio_mock.h")
CFLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-Werror")

# Modules that the guest needs for the interrupts of the device.
MODULES = ("vfio-pci",)


def module_files(kdir):
    """Maps the name of each module of a kernel build to its file."""
    files = {}
    for line in (kdir / "modules.order").read_text().split():
        path = kdir / Path(line).with_suffix(".ko")
        files[path.stem.replace("-", "_")] = path
    return files


def in_order(names, files):
    """Returns the files of the named modules and of their dependencies, in order."""
    order = []

    def add(name):
        # Everything else is built in.
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in depends[1].decode().split(",") if depends else ():
            add(other)
        order.append(path)

    for name in names:
        add(name)
    return order


def cpio_member(name, mode, data=b"", rdev=(0, 0)):
    """Returns one member of an archive in the kernel's format (newc)."""
    path = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(path), 0)
    member = b"070701" + b"".join(b"%08x" % n for n in numbers) + path
    member += bytes(-len(member) % 4) + data
    return member + bytes(-len(member) % 4)


def archive(init, modules):
    """The whole initramfs."""
    parts = [
        cpio_member("dev", 0o040755),
        cpio_member("dev/console", 0o020600, rdev=(5, 1)),
        cpio_member("init", 0o100755, init),
        cpio_member("modules", 0o040755),
    ]
    for i, path in enumerate(modules):
        name = f"modules/{i:02}-{path.name}"
        parts.append(cpio_member(name, 0o100644, path.read_bytes()))
    parts.append(cpio_member("TRAILER!!!", 0))
    return b"".join(parts)


def compile_init(cc):
    """The program /init, compiled."""
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "init"
        include = f"-I{HEADERS[-1].parent}"
        subprocess.run(
            [cc, *CFLAGS, include, "-o", out, *SOURCES], check=True
        )
        return out.read_bytes()


def build(kdir, folder):
    """Returns the path of the initramfs, which is created if it does not exist.

    Its name tells what it is made of, so that two runs cannot disturb each
    other.
    """
    cc = os.environ.get("HOSTCC", "cc")
    modules = in_order(MODULES, module_files(kdir))
    digest = hashlib.sha256(repr((cc, CFLAGS)).encode())
    for path in (Path(__file__), *SOURCES, *HEADERS, *modules):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    target = folder / f"initramfs-{digest.hexdigest()[:16]}.cpio"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{target.name}.{os.getpid()}"
        part.write_bytes(archive(compile_init(cc), modules))
        part.rename(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Arguments: KDIR FOLDER")
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
