# SPDX-License-Identifier: GPL-2.0
"""A client of QEMU's machine protocol on a connected socket."""

import json
import time


class QmpError(Exception):
    """QEMU refused a command, or has exited."""


class Qmp:
    """One connection. Events that arrive are collected in `events`."""

    def __init__(self, sock):
        self.sock = sock
        self.sock.setblocking(False)
        self.buffer = b""
        self.number = 0
        self.replies = []
        self.events = []
        self.closed = False

    def handshake(self, timeout):
        """Waits for the greeting and leaves the negotiation mode."""
        self._wait(timeout, "greeting")
        self.command("qmp_capabilities", timeout=timeout)

    def poll(self):
        """Processes the data received so far, without waiting."""
        while not self.closed:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
            self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            else:
                self.replies.append(message)

    def _wait(self, timeout, what, number=None):
        """Returns the answer to a command, or the greeting.

        Drops late answers to commands that were given up.
        """
        deadline = time.monotonic() + timeout
        while True:
            self.poll()
            while self.replies:
                reply = self.replies.pop(0)
                if reply.get("id") == number:
                    return reply
            if self.closed:
                raise QmpError(f"QEMU closed its monitor ({what})")
            if time.monotonic() > deadline:
                raise QmpError(f"no answer to {what} in {timeout} s")
            time.sleep(0.002)

    def command(self, name, arguments=None, timeout=60):
        """Runs one command and returns its result."""
        self.number += 1
        request = {"execute": name, "id": self.number}
        if arguments:
            request["arguments"] = arguments
        try:
            self.sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            # Read the data that was sent before the connection was closed.
            self.poll()
            raise QmpError(f"{name}: {error}") from error
        reply = self._wait(timeout, name, self.number)
        if "error" in reply:
            raise QmpError(f"{name}: {reply['error'].get('desc')}")
        return reply["return"]

    def take_events(self, name):
        """Removes and returns the data of all events of one name."""
        found = [e.get("data", {}) for e in self.events if e["event"] == name]
        self.events = [e for e in self.events if e["event"] != name]
        return found
