#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Writes an initramfs with the given program as its only file, /init."""

import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testing/qemu"))

from initramfs import cpio_member

sys.stdout.buffer.write(
    cpio_member("dev", 0o040755)
    + cpio_member("dev/console", 0o020600, rdev=(5, 1))
    + cpio_member("init", 0o100755, Path(sys.argv[1]).read_bytes())
    + cpio_member("TRAILER!!!", 0)
)
