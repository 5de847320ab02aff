# SPDX-License-Identifier: GPL-2.0
"""The QEMU that runs the test machine, from inside: its monitor is a port of it."""

import os
import struct
import time
import zlib
from itertools import count
from pathlib import Path
from typing import NamedTuple

from qmp import Qmp, QmpError

PORTS = Path("/sys/class/virtio-ports")
PORT = "vfio.monitor"

# The time limit of an answer in seconds.
TIMEOUT = 60


class Port:
    """A port of the machine, with the methods of a socket."""

    def __init__(self):
        name = next(
            path.name
            for path in PORTS.iterdir()
            if (path / "name").read_text().strip() == PORT
        )
        self.file = os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK)

    def setblocking(self, _):
        """The port is never blocking."""

    def recv(self, size):
        """Receives bytes."""
        return os.read(self.file, size)

    def sendall(self, data):
        """Sends bytes, as few as fit into the port."""
        os.write(self.file, data)

    def close(self):
        """Closes the port."""
        os.close(self.file)


class Screen(NamedTuple):
    """Content of a display."""

    width: int
    height: int
    # 3 bytes for each pixel.
    pixels: bytes

    def colours(self):
        """Returns the number of different pixels."""
        pixels = self.pixels
        return len({pixels[at : at + 3] for at in range(0, len(pixels), 3)})

    def small(self):
        """Returns rows of the display in a quarter of its size."""
        for row in range(0, self.height, 4):
            start = row * self.width * 3
            line = self.pixels[start : start + self.width * 3]
            yield b"".join(line[at : at + 3] for at in range(0, len(line), 12))


class Outside:
    """The monitor of the QEMU outside. It can be opened once."""

    def __init__(self, folder):
        """`folder` is one that the QEMU outside can write to."""
        self.folder = folder
        self.port = Port()
        self.qmp = Qmp(self.port)
        self.number = count()
        self.qmp.handshake(TIMEOUT)

    def screen(self, name):
        """Returns the content of the display with this name."""
        # Never the same file again, which may be cached.
        path = self.folder / f"{next(self.number)}.ppm"
        self.qmp.command(
            "screendump", {"filename": str(path), "device": name}, TIMEOUT
        )
        data = path.read_bytes()
        path.unlink()
        width, height = map(int, data.split(maxsplit=3)[1:3])
        return Screen(width, height, data[-width * height * 3 :])

    def plug(self, properties):
        """Plugs in a device."""
        self.qmp.command("device_add", properties, TIMEOUT)

    def add_memory(self, name, size):
        """Creates shared memory for a device."""
        properties = {"qom-type": "memory-backend-memfd", "share": True}
        self.qmp.command("object-add", properties | {"id": name, "size": size}, TIMEOUT)

    def unplug(self, name):
        """Asks the machine to release a device."""
        self.qmp.command("device_del", {"id": name}, TIMEOUT)

    def wait_unplugged(self, name):
        """Waits until the machine has released a device."""
        deadline = time.monotonic() + TIMEOUT
        while not any(
            event.get("device") == name
            for event in self.qmp.take_events("DEVICE_DELETED")
        ):
            if time.monotonic() > deadline:
                raise QmpError(f"{name} cannot be unplugged")
            time.sleep(0.01)
            self.qmp.poll()

    def close(self):
        """Closes the monitor."""
        self.port.close()


def write_png(path, rows):
    """Writes rows of screens as an image, in a quarter of their size."""
    lines = []
    for screens in rows:
        gap = b"\xff" * 3 * 4
        lines += [gap.join(parts) for parts in zip(*(each.small() for each in screens))]
        lines += [b"\xff" * len(lines[0])] * 4
    lines = lines[:-4]

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", len(lines[0]) // 3, len(lines), 8, 2, 0, 0, 0)
    # Only the difference to the pixel before it, which is small in most pictures.
    raw = b"".join(
        b"\1" + bytes((a - b) & 0xFF for a, b in zip(line, bytes(3) + line))
        for line in lines
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"tEXt", b"Copyright\0SPDX-License-Identifier: GPL-2.0")
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )
