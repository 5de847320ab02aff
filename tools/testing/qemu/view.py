# SPDX-License-Identifier: GPL-2.0
"""Output of the demo: permanent lines, and a status line."""

import sys
import time

INTERVAL = 0.5


def size(count):
    """Returns a readable number of bytes."""
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
        """Prints a permanent line."""
        if self.live:
            self._write("\r\033[K")
            self.live = ""
        self._write(f"{self.prefix}{text}\n")

    def follow(self, key, text):
        """Updates the status line. A line with a new key is always kept."""
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
        """Makes the status line permanent."""
        if self.live:
            self.say(self.live)
        self.key = None

    def _write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()
