# SPDX-License-Identifier: GPL-2.0
"""What the demo shows: lines that stay, and one that follows what happens."""

import sys
import time

INTERVAL = 0.5


def size(count):
    """A number of bytes, to be read by people."""
    if count < 1024:
        return f"{count} B"
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.1f} MiB"


class View:
    """Writes to standard output, for a terminal, for a log, or as TAP."""

    def __init__(self, columns=0, prefix=""):
        self.columns = columns
        self.prefix = prefix
        self.live = ""
        self.key = None
        self.next = 0.0

    def say(self, text):
        """A line that stays."""
        if self.live:
            self._write("\r\033[K")
            self.live = ""
        self._write(f"{self.prefix}{text}\n")

    def follow(self, key, text):
        """The newest state of things; one with a new key is always kept."""
        if self.columns:
            if key != self.key:
                self.settle()
            self.live = text
            self._write(f"\r\033[K{text[: self.columns - 1]}")
        elif key != self.key or time.monotonic() >= self.next:
            self.say(text)
            self.next = time.monotonic() + INTERVAL
        self.key = key

    def settle(self):
        """Keeps the line that followed."""
        if self.live:
            self.say(self.live)
        self.key = None

    def _write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()
