# SPDX-License-Identifier: GPL-2.0
"""One mediated device: its life in sysfs, and what it holds while a VMM has it.

A VMM owns its devices alone. The kernel lends us its file descriptors, though
(pidfd_getfd), and through them the device itself says what it holds and how
much it has left to send.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
import time
import uuid
from pathlib import Path
from typing import NamedTuple

BUS = Path("/sys/class/mdev_bus")
DEVICES = Path("/sys/bus/mdev/devices")
DEBUGFS = Path("/sys/kernel/debug/vfio")

SYS_PIDFD_GETFD = 438

# <linux/vfio.h>
VFIO_IO = 0x3B00 + 100
VFIO_DEVICE_GET_REGION_INFO = VFIO_IO + 8
VFIO_DEVICE_FEATURE = VFIO_IO + 17
VFIO_MIG_GET_PRECOPY_INFO = VFIO_IO + 21
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_STATE_STOP = 1

# The names that VFIO_DEVICE_STATE_* have without their prefix.
STATES = (
    "ERROR",
    "STOP",
    "RUNNING",
    "STOP_COPY",
    "RESUMING",
    "RUNNING_P2P",
    "PRE_COPY",
    "PRE_COPY_P2P",
)

DEVICE_FILE = re.compile(r"anon_inode:\[vfio-device\]|/dev/vfio/devices/.*")
STREAM_FILE = re.compile(r"anon_inode:.*mig.*")

libc = ctypes.CDLL(None, use_errno=True)


class Kind(NamedTuple):
    """What the devices of one parent have, and can do."""

    parent: str
    type: str
    # The BARs that must be equal on both sides, by what they hold.
    bars: dict
    # The register that counts the writes dropped in a stopped state, if any.
    dropped: int | None
    interrupts: bool


MOCK = Kind(
    "vfio_mock", "vfio_mock-16M", {"registers": 0, "memory": 2}, 0x58, True
)

# The DMA descriptors of a vfio_mock in its registers, and how one is going.
DMA_DESCRIPTORS = range(0x400, 0x800, 0x40)
DMA_PERIOD = 0x28
DMA_STATUS = 0x30
DMA_QUEUED = 1
DMA_ACTIVE = 2
# There are two of them in a guest, and twice that: less to stream and compare.
PEER = MOCK._replace(type="vfio_mock-1M")
MINIMAL = Kind("vfio_minimal", "vfio_minimal-64K", {"memory": 0}, None, False)


class Device:
    """A mediated device of a parent's type, from creation to removal."""

    def __init__(self, parent, mdev_type):
        types = BUS / parent / "mdev_supported_types"
        self.uuid = str(uuid.uuid4())
        self.path = DEVICES / self.uuid
        (types / mdev_type / "create").write_text(self.uuid)

    def remove(self, timeout=10):
        """Removes the device; one that is still in use stays a moment."""
        deadline = time.monotonic() + timeout
        while self.path.exists():
            try:
                (self.path / "remove").write_text("1")
            except OSError as error:
                busy = error.errno in (errno.EAGAIN, errno.EBUSY)
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _debugfs(self, name):
        with contextlib.suppress(OSError):
            return (DEBUGFS / self.uuid / "migration" / name).read_text()
        return ""

    def state(self):
        """The migration state, empty when the kernel does not tell."""
        return self._debugfs("state").strip()

    def features(self):
        """The names of what the device can do for migration."""
        return self._debugfs("features").split()


@contextlib.contextmanager
def borrow(pid, number):
    """A copy of file descriptor `number` of process `pid`.

    Kept for one question only: the device must see the owner's close().
    """
    pidfd = fd = -1
    try:
        pidfd = os.pidfd_open(pid)
        fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"descriptor of process {pid}")
        yield fd
    finally:
        for each in (fd, pidfd):
            if each >= 0:
                os.close(each)


def find_files(pid, pattern):
    """The descriptors of process `pid` whose files `pattern` tells."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if pattern.fullmatch(os.readlink(entry)):
                yield int(entry.name)


def find_device(pid, mdev):
    """The descriptor of process `pid` that is the mediated device."""
    for number in find_files(pid, DEVICE_FILE):
        info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        if re.search(f"^vfio-device-syspath:.*/{mdev.uuid}$", info, re.MULTILINE):
            return number
    raise OSError(errno.ENODEV, f"process {pid} has not got {mdev.uuid}")


def bytes_left(pid):
    """(initial, dirty) of the streams that process `pid` reads, or None."""
    total = None
    with contextlib.suppress(OSError):
        for number in find_files(pid, STREAM_FILE):
            with borrow(pid, number) as fd:
                # struct vfio_precopy_info
                info = bytearray(struct.pack("=IIQQ", 24, 0, 0, 0))
                fcntl.ioctl(fd, VFIO_MIG_GET_PRECOPY_INFO, info)
            initial, dirty = total or (0, 0)
            more = struct.unpack("=IIQQ", info)[2:]
            total = (initial + more[0], dirty + more[1])
    return total


def finish_loading(pid, mdev):
    """Takes a device of process `pid` from RESUMING to STOP.

    That puts in effect what was loaded, and is a part of the way to RUNNING
    that the VMM goes next.
    """
    with borrow(pid, find_device(pid, mdev)) as fd:
        flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        feature = struct.pack("=IIIi", 16, flags, VFIO_DEVICE_STATE_STOP, -1)
        fcntl.ioctl(fd, VFIO_DEVICE_FEATURE, bytearray(feature))


def dma_under_way(registers):
    """How many transfers are not at their end, and how many have none.

    One that has an end may be half-way when the device stops.
    """
    ending = endless = 0
    for descriptor in DMA_DESCRIPTORS:
        (status,) = struct.unpack_from("<I", registers, descriptor + DMA_STATUS)
        (period,) = struct.unpack_from("<I", registers, descriptor + DMA_PERIOD)
        if status == DMA_ACTIVE and period:
            endless += 1
        elif status in (DMA_QUEUED, DMA_ACTIVE):
            ending += 1
    return ending, endless


def read_region(pid, mdev, index):
    """All that region `index` of a device of process `pid` holds."""
    with borrow(pid, find_device(pid, mdev)) as fd:
        # struct vfio_region_info
        info = bytearray(struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, info)
        size, offset = struct.unpack("=IIIIQQ", info)[4:]
        parts = []
        while size:
            part = os.pread(fd, min(size, 1 << 20), offset)
            if not part:
                raise OSError(errno.EIO, f"region {index} ends early")
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return b"".join(parts)
