# SPDX-License-Identifier: GPL-2.0
"""One device: its entries in sysfs, and its content while a VMM has it open.

A device can be opened by one VMM only. This module duplicates its file descriptors
(pidfd_getfd) to read the content of the device and the size of its pending data.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
import subprocess
import time
import uuid
from pathlib import Path
from typing import NamedTuple

BUS = Path("/sys/class/mdev_bus")
DEVICES = Path("/sys/bus/mdev/devices")
PCI = Path("/sys/bus/pci/")
CONFIGFS = Path("/sys/kernel/config")
DEBUGFS = Path("/sys/kernel/debug/vfio")

SYS_PIDFD_GETFD = 438

# <linux/vfio.h>
VFIO_IO = 0x3B00 + 100
VFIO_DEVICE_GET_REGION_INFO = VFIO_IO + 8
VFIO_DEVICE_FEATURE = VFIO_IO + 17
VFIO_MIG_GET_PRECOPY_INFO = VFIO_IO + 21
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_STATE_STOP = 1

# The names of VFIO_DEVICE_STATE_* without the prefix.
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

# The names of VFIO_MIGRATION_* in debugfs, by bit.
FEATURES = ("stop-copy", "p2p", "pre-copy")

DEVICE_FILE = re.compile(r"anon_inode:\[vfio-device\]|/dev/vfio/devices/.*")
STREAM_FILE = re.compile(r"anon_inode:.*mig.*")

libc = ctypes.CDLL(None, use_errno=True)


class Kind(NamedTuple):
    """Properties of the devices of one parent, or of one PCI driver."""

    parent: str
    type: str | None
    # The BARs that must be equal on both sides, by name of their content.
    bars: dict
    # The register that counts the writes dropped in a stopped state, if any.
    dropped: int | None
    interrupts: bool


MOCK = Kind(
    "vfio_mock", "vfio_mock-16M", {"registers": 0, "memory": 2}, 0x58, True
)

# The DMA descriptors in the registers of a vfio_mock, and their state.
DMA_DESCRIPTORS = range(0x400, 0x800, 0x40)
DMA_PERIOD = 0x28
DMA_STATUS = 0x30
DMA_QUEUED = 1
DMA_ACTIVE = 2
# Smaller, because a guest has two of them, and each one exists on both sides.
PEER = MOCK._replace(type="vfio_mock-1M")
MINIMAL = Kind("vfio_minimal", "vfio_minimal-64K", {"memory": 0}, None, False)
# The bochs-display devices of the test machine.
DISPLAY = Kind("vfio_membar", None, {"memory": 0, "registers": 2}, None, False)
DISPLAY_ID = ("0x1234", "0x1111")


class Device:
    """A device, named by the UUID of a mediated device or the address of another one."""

    def __init__(self, name, path):
        self.name = name
        self.path = path
        # The process that has the device open.
        self.holder = None

    def cdev(self):
        """Returns the path of the character device."""
        (entry,) = (self.path / "vfio-dev").iterdir()
        return f"/dev/vfio/devices/{entry.name}"

    def _debugfs(self, name):
        return (DEBUGFS / self.name / "migration" / name).read_text()

    def _feature(self, number, layout):
        """Returns the values of a feature, which any process with the file can get."""
        flags = VFIO_DEVICE_FEATURE_GET | number
        size = 8 + struct.calcsize(layout)
        feature = bytearray(struct.pack("=II", size, flags).ljust(size, b"\0"))
        with borrow(self.holder, find_device(self.holder, self)) as fd:
            fcntl.ioctl(fd, VFIO_DEVICE_FEATURE, feature)
        return struct.unpack_from(layout, feature, 8)

    def state(self):
        """Returns the migration state, empty if it is unknown."""
        with contextlib.suppress(OSError):
            if DEBUGFS.exists():
                return self._debugfs("state").strip()
            if self.holder:
                state = self._feature(VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, "=Ii")
                return STATES[state[0]]
        return ""

    def features(self):
        """Returns the names of the migration features of the device."""
        with contextlib.suppress(OSError):
            if DEBUGFS.exists():
                return self._debugfs("features").split()
            if self.holder:
                (flags,) = self._feature(VFIO_DEVICE_FEATURE_MIGRATION, "=Q")
                return [n for bit, n in enumerate(FEATURES) if flags >> bit & 1]
        return []

    def turn(self, knobs):
        """Sets knobs, and returns their former values."""
        former = {}
        for name, value in knobs.items():
            file = self.path / "knobs" / name
            former[name] = file.read_text().strip()
            file.write_text(f"{value}\n")
        return former

    def statistics(self):
        """Returns the statistics on the last VMM, none without debugfs."""
        if not DEBUGFS.exists():
            return {}
        text = (DEBUGFS / self.name / "statistics").read_text()
        return {name: int(number) for name, number in map(str.split, text.splitlines())}

    def verdict(self):
        """Returns the lines of the verdict on the last VMM, none without debugfs."""
        if not DEBUGFS.exists():
            return []
        return (DEBUGFS / self.name / "verdict").read_text().splitlines()


class Mdev(Device):
    """A mediated device of a parent's type, from creation to removal."""

    def __init__(self, parent, mdev_type):
        name = str(uuid.uuid4())
        super().__init__(name, DEVICES / name)
        types = BUS / parent / "mdev_supported_types"
        (types / mdev_type / "create").write_text(name)

    def qemu(self):
        """Returns the property with which QEMU finds the device."""
        return {"sysfsdev": str(self.path)}

    def remove(self, timeout=10):
        """Removes the device. One that is still in use is removed a moment later."""
        deadline = time.monotonic() + timeout
        while self.path.exists():
            try:
                (self.path / "remove").write_text("1")
            except OSError as error:
                busy = error.errno in (errno.EAGAIN, errno.EBUSY)
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)


class Function(Device):
    """A software PCI function, from creation to removal."""

    def __init__(self, parent, function_type, settings):
        if not os.path.ismount(CONFIGFS):
            subprocess.run(["mount", "-t", "configfs", "none", CONFIGFS], check=True)
        self.directory = CONFIGFS / parent / str(uuid.uuid4())
        self.directory.mkdir()
        for name, value in {"type": function_type, **settings, "power": 1}.items():
            (self.directory / name).write_text(f"{value}\n")
        name = (self.directory / "address").read_text().strip()
        super().__init__(name, PCI / "devices" / name)

    def qemu(self):
        """Returns the property with which QEMU finds the device."""
        return {"host": self.name}

    def remove(self):
        """Removes the function, and waits while it is still in use."""
        self.directory.rmdir()


class Display(Device):
    """A display of the test machine, while it is bound to a variant driver."""

    def __init__(self, driver, path):
        super().__init__(path.name, path)
        (path / "driver_override").write_text(driver)
        (PCI / "drivers_probe").write_text(self.name)

    def qemu(self):
        """Returns the property with which QEMU finds the device."""
        return {"host": self.name}

    def remove(self):
        """Releases the device. One that is still in use is released after that."""
        (self.path / "driver/unbind").write_text(self.name)
        (self.path / "driver_override").write_text("\n")


def find_displays():
    """Returns the displays of the test machine, in the order of their addresses."""
    return [
        path
        for path in sorted((PCI / "devices").iterdir())
        if tuple((path / name).read_text().strip() for name in ("vendor", "device"))
        == DISPLAY_ID
    ]


@contextlib.contextmanager
def borrow(pid, number):
    """Duplicates file descriptor `number` of process `pid`.

    Kept for a single request, so that close() by the owner closes the device.
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
    """Returns the descriptors of process `pid` with files that match `pattern`."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if pattern.fullmatch(os.readlink(entry)):
                yield int(entry.name)


def find_device(pid, mdev):
    """Returns the descriptor of a device in process `pid`."""
    for number in find_files(pid, DEVICE_FILE):
        info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        if re.search(f"^vfio-device-syspath:.*/{mdev.name}$", info, re.MULTILINE):
            return number
    raise OSError(errno.ENODEV, f"process {pid} has not got {mdev.name}")


def bytes_left(pid):
    """Returns (initial, dirty) of the streams that process `pid` reads, or None."""
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
    """Changes the state of a device of process `pid` from RESUMING to STOP.

    This puts the loaded state into effect, and is a part of the path to RUNNING
    that the VMM takes next.
    """
    with borrow(pid, find_device(pid, mdev)) as fd:
        flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        feature = struct.pack("=IIIi", 16, flags, VFIO_DEVICE_STATE_STOP, -1)
        fcntl.ioctl(fd, VFIO_DEVICE_FEATURE, bytearray(feature))


def dma_under_way(registers):
    """Returns the numbers of unfinished finite transfers and of endless ones.

    A finite transfer may be in progress when the device stops.
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
    """Returns the content of region `index` of a device of process `pid`."""
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
