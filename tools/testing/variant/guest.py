#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Test the variant driver vfio_membar with devices of QEMU.

guest.py PROGRAMS MODULE [OPTION...]
guest.py PROGRAMS MODULE --only TEST...
guest.py --mutants LOGS PLAN

Runs in the test machine as root. PROGRAMS is the folder of the built kselftests,
MODULE is vfio_membar.ko. The machine has an IOMMU, two bochs-display and two
ivshmem-plain devices, each below a port of its own, so that the bus can reset them, and
a serial port that is connected to the monitor of its QEMU.
vfio_pci_test.ko is in this folder. OPTIONs are for vfio_migration_test. Prints TAP.
With --only, runs only the functions TEST of this file.

With --mutants, tests broken variants of the driver on bochs-display devices, for
tools/testing/mutate: LOGS and PLAN are those of run_mutants.sh.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "qemu"))
from outside import Outside
from qmp import QmpError

DEVICES = Path("/sys/bus/pci/devices")
DEBUGFS = Path("/sys/kernel/debug/vfio")
BOCHS = ("0x1234", "0x1111", 0)
IVSHMEM = ("0x1af4", "0x1110", 2)
# The properties with which QEMU plugs in an ivshmem-plain in place of the first one, see part
# variant of tools/testing/run.
PLUG = {"driver": "ivshmem-plain", "id": "ivshmem1", "bus": "port3"}
# For the names of the memory of devices that are plugged in.
numbers = itertools.count()
# The time limit of a test of a broken variant, in seconds.
MUTANT_LIMIT = 200
PAGE = mmap.PAGESIZE
# The size of a record of a stream.
RECORD = PAGE + 8

# Ioctls and features of VFIO.
VFIO_DEVICE_GET_REGION_INFO = 0x3B6C
VFIO_DEVICE_RESET = 0x3B6F
VFIO_DEVICE_PCI_HOT_RESET = 0x3B71
VFIO_DEVICE_FEATURE = 0x3B75
VFIO_DEVICE_BIND_IOMMUFD = 0x3B76
VFIO_MIG_GET_PRECOPY_INFO = 0x3B79
SET, STATE, LOW_POWER_ENTRY, LOW_POWER_EXIT = 1 << 17, 2, 3, 5
ERROR, STOP, RUNNING, STOP_COPY, RESUMING = 0, 1, 2, 3, 4
RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = 5, 6, 7
ALL_STATES = (RUNNING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, STOP_COPY, STOP, RESUMING)
STOPPED = (STOP_COPY, STOP, RESUMING)
# The parameters of vfio_pci_test, and the events for the first two: states of a PCI device, and
# calls of other error handlers.
REPORT, STALL, VANISH, CLAIM, FOLLOW = (
    Path("/sys/module/vfio_pci_test/parameters", name)
    for name in ("report", "stall", "vanish", "claim", "follow"))
IO_NORMAL, IO_FROZEN, IO_PERM_FAILURE = 0, 1, 2
SLOT_RESET, RESET_PREPARE, RESET_DONE = 3, 4, 5
REGION_MMAP = 1 << 2
COMMAND, MEMORY = 4, 2
CONFIG = 7
# In the configuration space: the capabilities. In that of a port: the bridge control register with
# the bit that resets the bus. In the PCIe capability of a port: the slot control
# register with the bit that turns off the power. In that of a device: the control register, with
# the bit that starts an FLR. In that of power management: the control register, with the state.
CAPABILITIES, PM, PCIE = 0x34, 0x01, 0x10
BRIDGE, BUS_RESET = 0x3E, 1 << 6
SLOT, POWER_OFF = 0x18, 1 << 10
CONTROL, START_FLR = 8, 1 << 15
PM_CONTROL, D0, D3HOT = 4, 0, 3


def check(condition, what):
    """Fails with `what` unless the condition holds."""
    if not condition:
        raise AssertionError(what)


def find(kind):
    """Returns the devices of a kind, in the order of their addresses."""
    found = [path for path in sorted(DEVICES.iterdir())
             if (path / "vendor").read_text().strip() == kind[0]
             and (path / "device").read_text().strip() == kind[1]]
    check(len(found) == 2, f"{len(found)} devices {kind[0]}:{kind[1]}")
    return found


def bind(path):
    """Binds a device to the driver, like driverctl and libvirt."""
    (path / "driver_override").write_text("vfio_membar")
    Path("/sys/bus/pci/drivers_probe").write_text(path.name)
    driver = os.readlink(path / "driver") if (path / "driver").exists() else "none"
    check(driver.endswith("/vfio_membar"), f"{path.name} is bound to {driver}")


def unbind(path):
    """Releases a device, if it is bound."""
    if (path / "driver").exists():
        (path / "driver/unbind").write_text(path.name)
    (path / "driver_override").write_text("\n")


def content(path, bar, data=None):
    """Reads or writes the memory of a device by the PCI bus, not by VFIO."""
    (path / "enable").write_text("1")
    file = os.open(path / f"resource{bar}", os.O_RDWR | os.O_SYNC)
    with mmap.mmap(file, os.fstat(file).st_size) as memory:
        os.close(file)
        if data is not None:
            memory[: len(data)] = data
        found = memory[:]
    (path / "enable").write_text("0")
    return found


def capability(config, number):
    """Returns the offset of a capability in a configuration space."""
    at = config[CAPABILITIES]
    while config[at] != number:
        at = config[at + 1]
        check(at, f"no capability {number}")
    return at


def power(path, enabled):
    """Turns the power of a device's slot on or off, unknown to the kernel."""
    port = os.open(path.resolve().parent / "config", os.O_RDWR)
    config = os.pread(port, 256, 0)
    at = capability(config, PCIE)
    control = struct.unpack_from("<H", config, at + SLOT)[0] & ~POWER_OFF
    os.pwrite(port, struct.pack("<H", control | (not enabled) * POWER_OFF), at + SLOT)
    os.close(port)


def bus_reset(path):
    """Resets the bus of a device, unknown to the kernel, like the AER driver does.

    The device has neither addresses nor memory space afterwards.
    """
    port = os.open(path.resolve().parent / "config", os.O_RDWR)
    control = struct.unpack("<H", os.pread(port, 2, BRIDGE))[0]
    for value in (control | BUS_RESET, control):
        os.pwrite(port, struct.pack("<H", value), BRIDGE)
    os.close(port)


def command_of(path):
    """Returns the command register of a device, not that which its user sees."""
    return struct.unpack_from("<H", (path / "config").read_bytes(), COMMAND)[0]


def start(function, *arguments):
    """Calls a function in a thread of its own."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def finish(*threads):
    """Waits for threads."""
    for thread in threads:
        thread.join(300)
    check(not any(thread.is_alive() for thread in threads), "a thread hangs")


def host_reset(path):
    """Resets a device by sysfs."""
    (path / "reset").write_text("1")


def report(path, event):
    """Reports an event of a device to its driver, like AER."""
    REPORT.write_text(f"{path.name} {event}")


def wait_for(condition, what):
    """Waits until a condition holds."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(what)


@functools.cache
def outside():
    """Returns the monitor of the QEMU that runs this machine, which can be opened once."""
    return Outside(None)


def fails(function, *arguments):
    """Returns the error with which a call fails, or None."""
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return None


def told(path, name):
    """Returns the content of a file of a device in debugfs."""
    return (DEBUGFS / path.name / name).read_text()


def check_told(device, state):
    """Checks the state changes after a reset by the host of a device in `state`.

    The first valid one fails if the device was stopped, and the next one succeeds.
    """
    for target in (ERROR, PRE_COPY_P2P + 1):
        check(fails(device.set_state, target) == errno.EINVAL, f"{target} is a target")
    if state in STOPPED:
        check(fails(device.set_state, RUNNING) == errno.ECANCELED, "a cleared device runs")
    device.set_state(RUNNING)


def pattern(size, seed):
    """Returns bytes that differ from page to page."""
    pages = (struct.pack("<QQ", seed, page) * (PAGE // 16) for page in range(size // PAGE))
    return b"".join(pages)


class Device:
    """A device opened with an iommufd."""

    def __init__(self, path, bar):
        node = next((path / "vfio-dev").iterdir()).name
        self.iommu = os.open("/dev/iommu", os.O_RDWR)
        self.file = os.open(f"/dev/vfio/devices/{node}", os.O_RDWR)
        bind_iommufd = bytearray(struct.pack("<IIiI", 16, 0, self.iommu, 0))
        try:
            fcntl.ioctl(self.file, VFIO_DEVICE_BIND_IOMMUFD, bind_iommufd)
        except OSError:
            self.close()
            raise
        self.size, self.offset, self.flags = self.region(bar)
        self.command(MEMORY)

    def region(self, index):
        """Returns the size, the offset and the flags of a region."""
        info = bytearray(struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self.file, VFIO_DEVICE_GET_REGION_INFO, info)
        _, flags, _, _, size, offset = struct.unpack("<IIIIQQ", info)
        return size, offset, flags

    def command(self, value):
        """Writes the command register."""
        _, offset, _ = self.region(CONFIG)
        os.pwrite(self.file, struct.pack("<H", value), offset + COMMAND)

    def set_state(self, state):
        """Sets the migration state and returns the descriptor of a new session."""
        feature = bytearray(struct.pack("<IIIi", 16, SET | STATE, state, -1))
        fcntl.ioctl(self.file, VFIO_DEVICE_FEATURE, feature)
        return struct.unpack("<IIIi", feature)[3]

    def state(self):
        """Returns the migration state."""
        feature = bytearray(struct.pack("<IIIi", 16, 1 << 16 | STATE, 0, -1))
        fcntl.ioctl(self.file, VFIO_DEVICE_FEATURE, feature)
        return struct.unpack("<IIIi", feature)[2]

    def reset(self):
        """Resets the device."""
        fcntl.ioctl(self.file, VFIO_DEVICE_RESET, 0)

    def hot_reset(self):
        """Resets the slot of the device."""
        fcntl.ioctl(self.file, VFIO_DEVICE_PCI_HOT_RESET, struct.pack("<III", 12, 0, 0))

    def control(self, number, offset, change):
        """Changes a register of a capability."""
        size, config, _ = self.region(CONFIG)
        at = config + capability(os.pread(self.file, size, config), number) + offset
        value = struct.unpack("<H", os.pread(self.file, 2, at))[0]
        os.pwrite(self.file, struct.pack("<H", change(value)), at)

    def function_reset(self):
        """Resets the device by its configuration space."""
        self.control(PCIE, CONTROL, lambda value: value | START_FLR)

    def power(self, state):
        """Changes the power state by the configuration space."""
        self.control(PM, PM_CONTROL, lambda value: value & ~D3HOT | state)

    def map(self):
        """Maps the memory."""
        check(self.flags & REGION_MMAP, "the memory cannot be mapped")
        return mmap.mmap(self.file, self.size, offset=self.offset)

    def sleep(self, feature=LOW_POWER_ENTRY):
        """Allows runtime PM to suspend the device."""
        fcntl.ioctl(self.file, VFIO_DEVICE_FEATURE, struct.pack("<II", 8, SET | feature))

    def wake(self):
        """Wakes the device."""
        self.sleep(LOW_POWER_EXIT)

    def read(self, size=None):
        """Reads the memory."""
        left, parts = size or self.size, []
        while left:
            part = os.pread(self.file, left, self.offset + (size or self.size) - left)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def write(self, data, at=0):
        """Writes the memory."""
        while data:
            done = os.pwrite(self.file, data, self.offset + at)
            data, at = data[done:], at + done

    def close(self):
        """Closes the device."""
        os.close(self.file)
        os.close(self.iommu)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def stream(source, end):
    """Reads a session until read() fails with the error `end`, or ends."""
    parts = []
    while True:
        try:
            part = os.read(source, 1 << 20)
        except OSError as error:
            check(error.errno == end, f"read: {error}")
            return b"".join(parts)
        if not part:
            check(end is None, "the stream has ended")
            return b"".join(parts)
        parts.append(part)


def aliases(_pair, _bar):
    """the module has aliases for driver_override"""
    text = subprocess.run(["modinfo", "-F", "alias", sys.argv[2]], check=True,
                          capture_output=True, text=True).stdout
    for (vendor, device, _), device_class in (BOCHS, "bc03sc80i00*"), (IVSHMEM, "bc*sc*i*"):
        alias = f"vfio_pci:v{int(vendor, 0):08X}d{int(device, 0):08X}sv*sd*{device_class}"
        check(alias in text.split(), f"no {alias} in {text}")


def clears(pair, bar):
    """content of the host is not visible, nor that of a user after the last close"""
    size = len(content(pair[0], bar))
    content(pair[0], bar, pattern(size, 1))
    bind(pair[0])
    with Device(pair[0], bar) as device:
        check(device.read() == bytes(size), "the user sees what the host has left")
        device.write(pattern(size, 2))
        device.reset()
        device.command(MEMORY)
        check(device.read() == bytes(size), "the reset does not clear the memory")
        device.write(pattern(size, 3))
        # The driver can clear it nevertheless.
        device.command(0)
    unbind(pair[0])
    check(content(pair[0], bar) == bytes(size), "the host sees what the user has left")


def moves(pair, bar):
    """every byte moves from one device to the other, changed pages again"""
    for path in pair:
        bind(path)
    with Device(pair[0], bar) as source, Device(pair[1], bar) as target:
        data = bytearray(pattern(source.size, 4))
        source.write(bytes(data))
        session = source.set_state(PRE_COPY)
        image = stream(session, errno.ENOMSG)
        check(len(image) > len(data), f"{len(image)} bytes of pre-copy")
        for page in (0, 5, source.size // PAGE - 1):
            data[page * PAGE + 8 : page * PAGE + 16] = b"changed!"
            source.write(b"changed!", page * PAGE + 8)
        source.set_state(STOP_COPY)
        # A stopped device drops writes.
        source.write(b"dropped!", 3 * PAGE)
        # The host can access memory that the guest has disabled.
        source.command(0)
        rest = stream(session, None)
        check(len(rest) == 4 * RECORD, f"{len(rest)} bytes of three pages and the end")
        load = target.set_state(RESUMING)
        target.command(0)
        for piece in (image + rest)[:100], (image + rest)[100:]:
            while piece:
                piece = piece[os.write(load, piece) :]
        target.set_state(RUNNING)
        target.command(MEMORY)
        check(target.read() == bytes(data), "the content differs")
        os.close(session)
        os.close(load)


def check_content(image, seed):
    """Checks that a part of an image has pages of a pattern only, after the first record."""
    for at in range(RECORD, len(image) - RECORD + 1, RECORD):
        check(image[at + 8 : at + 16] == struct.pack("<Q", seed),
              "a page is not from before the device was inaccessible")


def wakes(pair, bar):
    """a reset by the host wakes pollers and ends the session before it changes the device"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        session = device.set_state(PRE_COPY)
        stream(session, errno.ENOMSG)
        poller = select.poll()
        poller.register(session, select.POLLIN)
        check(not poller.poll(0), "the session is readable at the temporary end")
        reset = start(host_reset, pair[0])
        check(poller.poll(300_000), "the reset does not wake pollers")
        stream(session, errno.ENODEV)
        os.close(session)
        finish(reset)
        check(device.state() == RUNNING, "the device is not in RUNNING after a reset")
        device.write(pattern(device.size, 6))
        session = device.set_state(PRE_COPY)
        reset, parts = start(host_reset, pair[0]), []
        while True:
            try:
                parts.append(os.read(session, 1 << 16))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    break
                check(error.errno == errno.ENOMSG, f"read: {error}")
                device.write(pattern(PAGE, 6))
        finish(reset)
        check_content(b"".join(parts), 6)
        os.close(session)


def changed(session):
    """Returns the number of pages that are streamed until the temporary end."""
    return len(stream(session, errno.ENOMSG)) // RECORD


def store(mapped, pages, data):
    """Stores 8 bytes to each of some pages of a mapping."""
    for page in pages:
        mapped[page * PAGE + 16 : page * PAGE + 24] = data


def tracks(pair, bar):
    """stores to a mapping are streamed again, and only their pages"""
    for path in pair:
        bind(path)
    with (Device(pair[0], bar) as source, Device(pair[1], bar) as target,
          source.map() as mapped, target.map() as loaded):
        last = source.size // PAGE - 1
        mapped[:] = pattern(source.size, 12)
        check(source.read() == pattern(source.size, 12), "a store is not in the memory")
        session = source.set_state(PRE_COPY)
        image = stream(session, errno.ENOMSG)
        check(len(image) == (last + 2) * RECORD, f"{len(image)} bytes of pre-copy")
        poller = select.poll()
        poller.register(session, select.POLLIN)
        for data in b"changed1", b"changed2":
            check(mapped[:] == source.read(), "the mapping is not the memory")
            check(not poller.poll(0), "loads are tracked as stores")
            store(mapped, (0, 5, 6, last), data)
            # The second store to a page does not fault.
            store(mapped, (0, 5), data)
            check(poller.poll(0), "a store does not wake pollers")
            part = stream(session, errno.ENOMSG)
            check(len(part) == 4 * RECORD, f"{len(part)} bytes of four pages")
            image += part
        store(mapped, (7,), b"changed3")
        source.set_state(STOP_COPY)
        data = source.read()
        store(mapped, (3, 7), b"dropped!")
        check(source.read() == data, "a stopped device is changed by a store")
        part = stream(session, None)
        check(len(part) == 2 * RECORD, f"{len(part)} bytes of a page and the end")
        image += part
        load = target.set_state(RESUMING)
        while image:
            image = image[os.write(load, image) :]
        check(loaded[:] == data, "the content differs")
        target.set_state(RUNNING)
        store(loaded, (9,), b"running!")
        check(target.read()[9 * PAGE + 16 :][:8] == b"running!", "a store is dropped")
        os.close(session)
        os.close(load)


def states(pair, bar):
    """stores to a mapping change the device in the states in which it runs"""
    bind(pair[0])
    with Device(pair[0], bar) as device, device.map() as mapped:
        for state in (RUNNING, RUNNING_P2P, PRE_COPY_P2P, PRE_COPY, STOP_COPY, STOP, RUNNING,
                      RESUMING):
            session = device.set_state(state)
            runs = state not in (STOP, STOP_COPY, RESUMING)
            old = device.read(PAGE)
            data = struct.pack("<Q", 0x1234567800 + state)
            store(mapped, (0,), data)
            new = old[:16] + data + old[24:] if runs else old
            check(device.read(PAGE) == new, f"wrong content in state {state}")
            if session >= 0:
                os.close(session)


def child(function, *arguments):
    """Calls a function in a child, and returns its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        function(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def shares(pair, bar):
    """stores of a child, to a second mapping, and after mprotect() are tracked"""
    bind(pair[0])
    libc = ctypes.CDLL(None, use_errno=True)
    with Device(pair[0], bar) as device, device.map() as mapped, device.map() as other:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))

        def protect(prot):
            size = ctypes.c_size_t(device.size)
            check(libc.mprotect(ctypes.c_void_p(address), size, prot) == 0, "mprotect")

        store(mapped, range(8), b"parent__")
        session = device.set_state(PRE_COPY)
        changed(session)
        for data in b"child_1_", b"child_2_":
            check(child(store, mapped, (1, 2), data) == 0, "the child dies")
            check(changed(session) == 2, "stores of a child are not tracked")
            store(mapped, (2,), data)
            check(changed(session) == 1, "a store after that of a child is not tracked")
            store(other, (2, 3), data)
            check(changed(session) == 2, "stores to a second mapping are not tracked")
            # The pages are writable in the parent when it forks.
            store(mapped, (4, 5), data)
            ready, go = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(ready[1], b"1")
                os.read(go[0], 1)
                store(mapped, (4,), b"inherit_")
                os._exit(0)
            os.read(ready[0], 1)
            check(changed(session) == 2, "stores before fork() are not tracked")
            os.write(go[1], b"1")
            check(os.waitpid(pid, 0)[1] == 0, "the child dies")
            check(changed(session) == 1, "stores to inherited pages are not tracked")
            for end in (*ready, *go):
                os.close(end)
            store(mapped, (6, 7), data)
            protect(mmap.PROT_READ)
            check(changed(session) == 2, "stores before mprotect() are not tracked")
            check(mapped[6 * PAGE + 16 :][:8] == data, "wrong content")
            protect(mmap.PROT_READ | mmap.PROT_WRITE)
            check(changed(session) == 0, "mprotect() is tracked as a store")
            store(mapped, (6,), b"protect_")
            check(changed(session) == 1, "stores after mprotect() are not tracked")
        os.close(session)


def remains(pair, bar):
    """a mapping remains through resets, and raises SIGBUS without power or memory space"""
    bind(pair[0])
    with Device(pair[0], bar) as device, device.map() as mapped:
        for by_user in True, False:
            for state in (RUNNING, PRE_COPY, STOP_COPY, RESUMING, STOP):
                mapped[:] = pattern(device.size, 13)
                session = device.set_state(state)
                store(mapped, (0, 1), b"dropped?")
                if by_user:
                    device.reset()
                    device.command(MEMORY)
                else:
                    host_reset(pair[0])
                # The first access after a reset by the host completes it.
                check(mapped[:] == bytes(device.size), "a reset does not clear the mapping")
                check(device.state() == RUNNING, "the device is not in RUNNING after a reset")
                store(mapped, (0, 9), b"running!")
                check(device.read()[9 * PAGE + 16 :][:8] == b"running!", "a store is dropped")
                if session >= 0:
                    os.close(session)
                if not by_user:
                    check_told(device, state)
                device.set_state(RUNNING)
            session = device.set_state(PRE_COPY)
            changed(session)
            store(mapped, (1, 2, 3), b"tracked!")
            check(changed(session) == 3, "stores after a reset are not tracked")
            device.set_state(RUNNING)
            os.close(session)
        # Stores during a reset wait for its end.
        resets = start(host_reset, pair[0])
        while resets.is_alive():
            store(mapped, range(16), b"in_reset")
        finish(resets)
        store(mapped, (4,), b"finished")
        check(device.read()[4 * PAGE + 16 :][:8] == b"finished", "a store is lost")
        device.command(0)
        for state in (RUNNING, PRE_COPY, STOP_COPY):
            session = device.set_state(state)
            check(child(store, mapped, (0,), b"disabled") == -signal.SIGBUS,
                  "a store without memory space raises no SIGBUS")
            if session >= 0:
                os.close(session)
        device.command(MEMORY)
        check(child(store, mapped, (0,), b"enabled!") == 0, "a store raises SIGBUS")
        device.sleep()
        check(child(store, mapped, (0,), b"asleep__") == -signal.SIGBUS,
              "a store without power raises no SIGBUS")
        device.wake()
        check(child(store, mapped, (0,), b"awake___") == 0, "a store raises SIGBUS")


def closes(pair, bar):
    """a close with a reset by the host leaves a clear device, which can be opened again"""
    for seed in range(8):
        bind(pair[0])
        device = Device(pair[0], bar)
        device.write(pattern(device.size, seed))
        if seed & 1:
            device.sleep()
        # Either may begin first.
        threads = [(host_reset, pair[0]), (device.close,)]
        finish(*(start(*call) for call in (threads if seed & 2 else threads[::-1])))
        unbind(pair[0])
        found = content(pair[0], bar)
        check(found == bytes(len(found)), f"{seed}: the host sees what the user has left")
    bind(pair[0])
    with Device(pair[0], bar) as device:
        device.write(pattern(device.size, 9))
        check(device.read() == pattern(device.size, 9), "the device does not work")


def dies(pair, bar):
    """a device that does not respond is neither saved nor run, until it is opened again"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        device.write(pattern(device.size, 10))
        session = device.set_state(PRE_COPY)
        part = os.read(session, 1 << 16)
        power(pair[0], False)
        try:
            part += stream(session, errno.EIO)
        finally:
            power(pair[0], True)
        check_content(part, 10)
        os.close(session)
    for state in ALL_STATES:
        with Device(pair[0], bar) as device:
            session = device.set_state(state)
            begin(session, state)
            power(pair[0], False)
            try:
                target = RUNNING if state in (STOP_COPY, RESUMING) else STOP_COPY
                check(fails(device.set_state, target) == errno.EIO, "it runs or is saved")
                check(device.state() == ERROR, "the device is not in ERROR")
                if session >= 0:
                    check_ended(session, state)
            finally:
                power(pair[0], True)
    with Device(pair[0], bar) as device:
        check(device.read() == bytes(device.size), "the user sees what another has left")
        device.write(pattern(device.size, 11))
        check(device.read() == pattern(device.size, 11), "the device does not work")


def surprises(pair, bar):
    """a device after an unannounced reset of its bus is neither saved nor run, until a reset"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        session = device.set_state(STOP_COPY)
        image = stream(session, None)
        os.close(session)
        device.set_state(RUNNING)
        cases = itertools.product(ALL_STATES, ((MEMORY, False, device.reset),
                                               (0, False, lambda: host_reset(pair[0])),
                                               (MEMORY, True, lambda: host_reset(pair[0])),
                                               (0, True, device.reset)))
        for state, (memory, is_told, reset) in cases:
            device.write(pattern(device.size, 26))
            session = device.set_state(state)
            if state == RESUMING:
                os.write(session, image[:RECORD])
            else:
                begin(session, state)
            device.command(memory)
            bus_reset(pair[0])
            check(fails(device.read) == errno.EIO, "the device can be read")
            if state == RESUMING:
                error = fails(os.write, session, image[RECORD : 2 * RECORD])
                check(error == errno.EIO, f"write: {error}")
            elif session >= 0:
                check(len(stream(session, errno.EIO)) < RECORD, "a page is saved")
            target = RUNNING if state in (STOP_COPY, RESUMING) else STOP_COPY
            if is_told:
                report(pair[0], SLOT_RESET)
            else:
                check(fails(device.set_state, target) == errno.EIO, "it runs or is saved")
            check(device.state() == ERROR, "the device is not in ERROR")
            if session >= 0:
                check_ended(session, state)
            check(fails(device.set_state, target) == errno.EINVAL, "ERROR can be left")
            reset()
            check(device.state() == RUNNING, "the device is not in RUNNING")
            if not memory:
                check(not command_of(pair[0]) & MEMORY, "the memory is enabled")
                device.command(MEMORY)
            check(device.read() == bytes(device.size), "the memory is not clear")
        device.write(pattern(device.size, 27))
        bus_reset(pair[0])
    unbind(pair[0])
    found = content(pair[0], bar)
    check(found == bytes(len(found)), "the host sees what the user has left")


def stall(path, event, errors):
    """Reports an event while a task waits for the device. Adds the error, or None."""
    errors.append(fails(STALL.write_text, f"{path.name} {event}"))


def stalls(pair, bar):
    """an error is reported while a saver waits for the device"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        for event in IO_FROZEN, SLOT_RESET:
            device.write(pattern(device.size, 28))
            session = device.set_state(PRE_COPY)
            errors = []
            reporter = start(stall, pair[0], event, errors)
            wait_for(lambda: STALL.read_text() == "Y\n", "the lock is not held")
            error = fails(os.read, session, 1 << 20) or fails(os.read, session, 1 << 20)
            finish(reporter)
            report(pair[0], IO_NORMAL)
            check(errors == [None], f"the report fails: {errors}")
            check(error in (errno.EIO, errno.ENODEV), f"read: {error}")
            check(device.state() == ERROR, "the device is not in ERROR")
            check_ended(session, PRE_COPY)
            device.reset()
            device.command(MEMORY)
            check(device.read() == bytes(device.size), "the memory is not clear")


def vanishes(pair, bar):
    """a device that vanishes while the crate has enabled its memory keeps its command register"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        device.write(pattern(device.size, 29))
        session = device.set_state(PRE_COPY)
        os.read(session, 100)
        device.command(0)
        old = command_of(pair[0])
        VANISH.write_text(f"{pair[0].name} 1")
        try:
            part = stream(session, errno.EIO)
        finally:
            VANISH.write_text(f"{pair[0].name} 0")
        check(len(part) < RECORD, "a page is saved")
        found = command_of(pair[0])
        check((old ^ found) & ~MEMORY == 0, f"the command register was {old:#x}, is {found:#x}")
        os.close(session)


def removes(pair, bar):
    """a removal of an open device waits for the close, and the device is clear afterwards"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        device.write(pattern(device.size, 14))
        session = device.set_state(PRE_COPY)
        remove = start((pair[0] / "remove").write_text, "1")
        # The device works until it is closed.
        stream(session, errno.ENOMSG)
        device.write(b"changed!")
        check(len(stream(session, errno.ENOMSG)) == RECORD, "a page is not streamed again")
        device.set_state(STOP_COPY)
        stream(session, None)
        check(remove.is_alive(), "the device is removed while it is open")
    finish(remove)
    stream(session, errno.ENODEV)
    os.close(session)
    check(not pair[0].exists(), "the device is not removed")
    Path("/sys/bus/pci/rescan").write_text("1")
    found = content(pair[0], bar)
    check(found == bytes(len(found)), "the host sees what the user has left")


def verdict(path):
    """Returns the verdict on the last client of a device."""
    return told(path, "verdict")


def judges(pair, bar):
    """the verdict is clean after a migration, and not after half of one"""
    moves(pair, bar)
    for path in pair:
        check(verdict(path) == "clean\n", f"{path.name}: {verdict(path)}")
    with Device(pair[0], bar) as device:
        session = device.set_state(STOP_COPY)
        os.read(session, 100)
    os.close(session)
    check(verdict(pair[0]) != "clean\n", "half of the stream is enough")
    check(verdict(pair[1]) == "clean\n", "it is that of another device")


def follows(pair, bar):
    """the kernel finds a page that is unmapped after its page fault"""
    bind(pair[0])
    with Device(pair[0], bar) as device, device.map() as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        session = device.set_state(PRE_COPY)
        ended = threading.Event()

        def save():
            """Streams each page at once, which unmaps it."""
            poller = select.poll()
            poller.register(session, select.POLLIN)
            while not ended.is_set():
                stream(session, errno.ENOMSG)
                poller.poll(100)

        saver = start(save)
        for page in range(8):
            FOLLOW.write_text(str(address + page * PAGE))
        ended.set()
        finish(saver)
        os.close(session)


def begin(session, state):
    """Uses the session of a state, if there is one, to the middle of a record."""
    if state == RESUMING:
        os.write(session, b"MEMBAR")
    elif session >= 0:
        os.read(session, 100)


def check_ended(session, state):
    """Checks that the session of a state has ended, and closes it."""
    call = (os.write, session, b"1") if state == RESUMING else (os.read, session, 1)
    check(fails(*call) == errno.ENODEV, "the session has not ended")
    if state in (PRE_COPY, PRE_COPY_P2P):
        info = bytearray(struct.pack("<IIQQ", 24, 0, 0, 0))
        error = fails(fcntl.ioctl, session, VFIO_MIG_GET_PRECOPY_INFO, info)
        check(error == errno.ENODEV, "the session has a size")
    poller = select.poll()
    poller.register(session, select.POLLIN | select.POLLOUT)
    check(poller.poll(0), "a session that has ended is not ready")
    os.close(session)


def replug(path):
    """Plugs in a device after the one in its place is gone."""
    outside().wait_unplugged(PLUG["id"])
    check(not path.exists(), "the device is not removed")
    # QEMU 10.0 aborts if the memory of an unplugged device is used again.
    memory = f"memory{next(numbers)}"
    outside().add_memory(memory, 1 << 20)
    outside().plug(PLUG | {"memdev": memory})
    wait_for(path.exists, "no device is plugged in")
    # Waits until it is complete.
    Path("/sys/bus/pci/rescan").write_text("1")


def unplugs(pair, bar):
    """an unplugged device works until its close, in any state, and one in its place migrates"""
    path = pair[0]
    for state in ALL_STATES:
        bind(path)
        with Device(path, bar) as device:
            device.write(pattern(device.size, 23))
            session = device.set_state(state)
            begin(session, state)
            outside().unplug(PLUG["id"])
            wait_for(lambda: not (path / "vfio-dev").exists(), "it is not being removed")
            check(device.state() == state, "the unplugged device has another state")
            check(device.read() == pattern(device.size, 23), "it has another content")
            if state in (PRE_COPY, PRE_COPY_P2P):
                stream(session, errno.ENOMSG)
                device.set_state(STOP_COPY)
            if state in (PRE_COPY, PRE_COPY_P2P, STOP_COPY):
                stream(session, None)
        replug(path)
        if session >= 0:
            check_ended(session, RESUMING if state == RESUMING else STOP_COPY)
    moves(pair, bar)
    # The removal of a device that is not open does not wait.
    outside().unplug(PLUG["id"])
    replug(path)


def reports(pair, bar):
    """a fatal error ends the session and leads to ERROR until a reset"""
    bind(pair[0])
    try:
        reports_errors(pair[0], bar)
    finally:
        with contextlib.suppress(OSError):
            report(pair[0], IO_NORMAL)


def reports_errors(path, bar):
    """Is that test, except for its end: the last report may be of an error."""
    with Device(path, bar) as device:
        for reset in device.reset, lambda: host_reset(path):
            for state in ALL_STATES:
                device.write(pattern(device.size, 17))
                session = device.set_state(state)
                report(path, IO_NORMAL)
                check(device.state() == state, "an error that is not fatal has an effect")
                report(path, IO_FROZEN)
                check(device.state() == ERROR, "the device is not in ERROR")
                if session >= 0:
                    check_ended(session, state)
                check(fails(device.set_state, RUNNING) == errno.EINVAL, "ERROR can be left")
                check(fails(device.read) == errno.EIO, "the device can be read")
                check(fails(device.write, b"dropped!") is None, "a write is not dropped")
                report(path, IO_NORMAL)
                check(device.state() == ERROR, "the device is not in ERROR")
                reset()
                check(device.state() == RUNNING, "the device is not in RUNNING")
                device.command(MEMORY)
                check(device.read() == bytes(device.size), "the memory is not clear")
        # The state of a stopped device is lost, although no call has said so before the reset.
        device.write(pattern(device.size, 18))
        for state in STOPPED:
            session = device.set_state(state)
            report(path, IO_FROZEN)
            check(fails(device.read) == errno.EIO, "the device can be read")
            report(path, IO_NORMAL)
            host_reset(path)
            check_told(device, state)
            device.command(MEMORY)
            if session >= 0:
                os.close(session)
        device.write(pattern(device.size, 18))
        report(path, IO_PERM_FAILURE)
        check(fails(device.reset) is not None, "a device that is gone is reset")
        check(device.state() == ERROR, "the device is not in ERROR")
        check(fails(device.set_state, STOP_COPY) == errno.EINVAL, "it is saved")
    check(fails(Device, path, bar) is not None, "a device that is gone is opened")
    (path / "remove").write_text("1")
    Path("/sys/bus/pci/rescan").write_text("1")
    bind(path)
    with Device(path, bar) as device:
        check(device.read() == bytes(device.size), "the user sees what another has left")


def resets(pair, bar):
    """a reset by the user or by the host in any state leads to RUNNING and a clear device"""
    bind(pair[0])
    with Device(pair[0], bar) as device:
        check("\nresets 0\n" in told(pair[0], "statistics"), "the open counts as a reset")
        check_reset(device, device.reset)
        check_advice(pair[0], 1)
        check_reset(device, device.hot_reset)
        check_reset(device, lambda: host_reset(pair[0]), False)
        check_advice(pair[0], 2)


def check_advice(path, count):
    """Checks that the verdict is clean, with advice on a number of resets."""
    # Only resets by the user in STOP_COPY count.
    want = f"clean\nadvice: reset_in_session: count {count}, first in STOP_COPY "
    found = verdict(path)
    check(found.startswith(want) and found.count("\n") == 2, found)


def check_reset(device, reset, by_user=True):
    """Resets a device in each state."""
    for state in ALL_STATES:
        device.write(pattern(device.size, 19))
        session = device.set_state(state)
        begin(session, state)
        reset()
        check(device.state() == RUNNING, "the device is not in RUNNING")
        # The first call after the reset is one of the session.
        if session >= 0:
            check_ended(session, state)
        # And here it is a state change.
        reset()
        if not by_user:
            check_told(device, state)
        os.close(device.set_state(STOP_COPY))
        check(device.state() == STOP_COPY, "the device is not in STOP_COPY")
        device.set_state(RUNNING)
        device.command(MEMORY)
        check(device.read() == bytes(device.size), "the memory is not clear")


def claims(pair, bar):
    """FLR and D3hot by the user or by the host, in any state"""
    rescan(pair, True)
    try:
        bind(pair[0])
        with Device(pair[0], bar) as device:
            check((pair[0] / "reset_method").read_text().startswith("flr"), "it has no FLR")
            check_reset(device, device.function_reset)
            check_reset(device, device.reset)
            check_reset(device, lambda: host_reset(pair[0]), False)
            check_advice(pair[0], 2)
            check_power(pair[0], device)
            check_unpowered(pair[0], device)
            device.write(pattern(device.size, 24))
            device.power(D3HOT)
        unbind(pair[0])
        found = content(pair[0], bar)
        check(found == bytes(len(found)), "the host sees what the user has left")
        sleeps(pair, bar)
    finally:
        rescan(pair, False)


def rescan(pair, claim):
    """Lets the kernel find devices again that claim more than they have, or no longer."""
    for path in pair:
        CLAIM.write_text(f"{path.name} {int(claim)}")
        (path / "remove").write_text("1")
    Path("/sys/bus/pci/rescan").write_text("1")


def check_power(path, device):
    """Puts a device into D3hot and back, and resets it there, in each state."""
    for state, reset in itertools.product(ALL_STATES, (device.reset, lambda: host_reset(path))):
        device.write(pattern(device.size, 25))
        with device.map() as mapped:
            session = device.set_state(state)
            begin(session, state)
            device.power(D3HOT)
            check(fails(device.read) == errno.EIO, "a device without power can be read")
            check(child(store, mapped, (0,), b"asleep__") == -signal.SIGBUS,
                  "a store without power raises no SIGBUS")
        image = b""
        if session >= 0 and state != RESUMING:
            # The rest of the first record.
            image = stream(session, errno.EIO)
            check(len(image) < RECORD, "a device without power is saved")
        # The host wakes it first, and suspends it from D0.
        suspend(path, device)
        check((path / "power_state").read_text() == "D3hot\n", "it is suspended elsewhere")
        device.wake()
        device.power(D3HOT)
        device.power(D0)
        device.command(MEMORY)
        check(device.read() == pattern(device.size, 25), "the content differs")
        check(device.state() == state, "the device has another state")
        if image:
            # The saver was called again after its error, which the next read() returns.
            check(fails(os.read, session, 1) == errno.EIO, "the second error is lost")
            image += stream(session, None if state == STOP_COPY else errno.ENOMSG)
            records = device.size // PAGE + (2 if state == STOP_COPY else 1)
            check(len(image) == records * RECORD - 100, f"{len(image)} bytes are left")
        device.power(D3HOT)
        reset()
        check(device.state() == RUNNING, "the device is not in RUNNING")
        if session >= 0:
            check_ended(session, state)
        device.command(MEMORY)
        check(device.read() == bytes(device.size), "the memory is not clear")
        if reset != device.reset:
            check_told(device, state)


def check_unpowered(path, device):
    """Writes to a device in D3hot, changes its state there, and resets it late."""
    for state in ALL_STATES:
        device.write(pattern(device.size, 30))
        session = device.set_state(state)
        device.power(D3HOT)
        want = None if state in STOPPED else errno.EIO
        check(fails(device.write, b"dropped!") == want, "a write without power has a wrong end")
        device.power(D0)
        device.command(MEMORY)
        check(device.read(PAGE) == pattern(PAGE, 30), "a write without power is not dropped")
        device.power(D3HOT)
        if session >= 0:
            os.close(session)
        for target in (RUNNING, RUNNING_P2P, STOP, RUNNING, PRE_COPY, PRE_COPY_P2P, RUNNING,
                       STOP_COPY, STOP, RUNNING):
            if state == RESUMING:
                check(fails(device.set_state, target) == errno.EINVAL, "half an image runs")
                check(device.state() == RESUMING, "the device is not in RESUMING")
                break
            new = device.set_state(target)
            check(device.state() == target, "the device is not in the target")
            if new >= 0:
                os.close(new)
        device.reset()
        device.command(MEMORY)
    check_unpowered_transfer(device)
    # A reset of which the driver was told, but which has left the device in D3hot.
    device.write(pattern(device.size, 31))
    device.power(D3HOT)
    for event in RESET_PREPARE, RESET_DONE:
        report(path, event)
    device.reset()
    check(device.state() == RUNNING, "the device is not in RUNNING")
    device.command(MEMORY)
    check(device.read() == bytes(device.size), "the memory is not clear")
    # The same by the host: the driver fails, and the next reset by the host repairs the device.
    device.set_state(STOP)
    device.power(D3HOT)
    for event in RESET_PREPARE, RESET_DONE:
        report(path, event)
    check(fails(device.read) == errno.EIO, "a device without power can be read")
    check(device.state() == ERROR, "the device is not in ERROR")
    device.power(D0)
    host_reset(path)
    check_told(device, STOP)
    device.command(MEMORY)


def check_unpowered_transfer(device):
    """Saves a device that is in D3hot at first, and loads it in D3hot."""
    data = pattern(device.size, 32)
    device.write(data)
    session = device.set_state(PRE_COPY)
    device.power(D3HOT)
    device.set_state(STOP_COPY)
    image = stream(session, errno.EIO)
    device.power(D0)
    # The saver was called again after its error, which the next read() returns.
    check(fails(os.read, session, 1) == errno.EIO, "the second error is lost")
    image += stream(session, None)
    os.close(session)
    check(len(image) == (device.size // PAGE + 2) * RECORD, f"{len(image)} bytes of an image")
    device.set_state(RUNNING)
    session = device.set_state(RESUMING)
    device.power(D3HOT)
    # The first record needs no device.
    check(os.write(session, image[:RECORD]) == RECORD, "the first record is not loaded")
    for _ in range(2):
        check(fails(os.write, session, image[RECORD:]) == errno.EIO, "a page is loaded")
        device.power(D0)
    check(fails(device.set_state, RUNNING) == errno.EIO, "half an image runs")
    check(device.state() == RESUMING, "the device is not in RESUMING")
    check(device.read(PAGE) == data[:PAGE], "the content differs")
    os.close(session)
    device.reset()
    device.command(MEMORY)


def suspend(path, device):
    """Lets runtime PM suspend a device, and waits until it has."""
    device.sleep()
    wait_for(lambda: (path / "power/runtime_status").read_text() == "suspended\n",
             "it is not suspended")


def sleeps(pair, bar):
    """a suspended device wakes for its driver, in any state"""
    for path in pair:
        bind(path)
    with Device(pair[0], bar) as source, Device(pair[1], bar) as target:
        source.write(pattern(source.size, 20))
        session = source.set_state(PRE_COPY)
        image = os.read(session, 100)
        source.sleep()
        image += stream(session, errno.ENOMSG)
        source.set_state(STOP_COPY)
        source.wake()
        source.sleep()
        image += stream(session, None)
        os.close(session)
        target.sleep()
        load = target.set_state(RESUMING)
        while image:
            image = image[os.write(load, image) :]
        os.close(load)
        target.set_state(RUNNING)
        target.wake()
        check(target.read() == pattern(target.size, 20), "the content differs")
        for state in ALL_STATES:
            target.write(pattern(target.size, 21))
            session = target.set_state(state)
            suspend(pair[1], target)
            target.wake()
            check(target.state() == state, "the device has another state")
            check(target.read() == pattern(target.size, 21), "the content differs")
            suspend(pair[1], target)
            host_reset(pair[1])
            check(target.state() == RUNNING, "the device is not in RUNNING")
            target.wake()
            check(target.read() == bytes(target.size), "the memory is not clear")
            check_told(target, state)
            if session >= 0:
                os.close(session)


def race(path, device, mapped):
    """Makes calls in several threads for a while, then each of them alone."""
    end = time.monotonic() + 15

    def migrate():
        """save an image"""
        for state in (PRE_COPY, STOP_COPY, RUNNING):
            session = device.set_state(state)
            if session >= 0:
                try:
                    os.read(session, 1 << 20)
                finally:
                    os.close(session)

    def load():
        """begin to load"""
        session = device.set_state(RESUMING)
        try:
            os.write(session, bytes(100))
        finally:
            os.close(session)

    def reset():
        """reset by VFIO"""
        time.sleep(0.5)
        device.reset()

    def reset_by_host():
        """reset by sysfs"""
        time.sleep(1)
        host_reset(path)

    def access():
        """read and write memory"""
        device.write(device.read(PAGE), PAGE)

    def access_mapping():
        """load and store"""
        mapped[2 * PAGE : 3 * PAGE] = mapped[:PAGE]

    steps = (migrate, load, reset, reset_by_host, access, access_mapping)

    def repeat(step):
        """Repeats a step, which may fail at any time: a reset ends it."""
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                step()

    finish(*[start(repeat, step) for step in steps])
    for step in steps:
        device.reset()
        device.command(MEMORY)
        step()


def races(pair, bar):
    """resets by the user and by the host race with state changes, transfers and accesses"""
    bind(pair[0])
    with Device(pair[0], bar) as device, device.map() as mapped:
        race(pair[0], device, mapped)
        device.reset()
        check(device.state() == RUNNING, "the device is not in RUNNING after a reset")
        device.command(MEMORY)
        check(device.read() == bytes(device.size), "the memory is not clear after a reset")
        device.write(pattern(device.size, 5))
        host_reset(pair[0])
        check(device.read() == bytes(device.size), "a reset by the host does not clear the memory")


TESTS = [(test, kind, label)
         for kind, label in ((BOCHS, "bochs-display"), (IVSHMEM, "ivshmem-plain"))
         for test in (clears, moves, judges, tracks, states, shares, follows, remains, wakes,
                      resets, sleeps, claims, closes, dies, surprises, vanishes, stalls, reports,
                      removes, unplugs, races)
         # QEMU 10.0 does not tell when it has unplugged a bochs-display. ivshmem-plain has no
         # PCIe capability.
         if not (test is unplugs and kind is BOCHS or test is claims and kind is IVSHMEM)]


def attempt(test, kind):
    """Runs a test, and prints why it fails. Returns whether it passes."""
    try:
        try:
            test(find(kind), kind[2])
        finally:
            for path in find(kind):
                unbind(path)
    except (AssertionError, OSError, QmpError) as error:
        # The first error is that of the test.
        print(f"# {error.__context__ or error!r}")
        return False
    return True


def mutants(logs, plan):
    """Runs tests on broken variants of the driver."""
    known = {test.__name__: test for test, kind, _ in TESTS if kind is BOCHS}

    def run(test, log):
        # A store that faults for ever ends only with the process.
        signal.alarm(MUTANT_LIMIT)
        code = 1
        try:
            known[test](find(BOCHS), BOCHS[2])
            code = 0
        except (AssertionError, OSError) as error:
            print(f"# {error!r}", file=log, flush=True)
        finally:
            os._exit(code)

    for line in Path(plan).read_text(encoding="utf-8").splitlines():
        name, module, command = line.split("\t")
        for file in Path(module).with_name("vfio_pci_test.ko"), module:
            subprocess.run(["insmod", file], check=True)
        with Path(logs, f"{name}.log").open("w") as log:
            for number, test in enumerate(command.split()[1:], 1):
                # A test that fails leaves files open, and a driver bound.
                code = child(run, test, log)
                for path in find(BOCHS):
                    unbind(path)
                print(f"{'not ' if code else ''}ok {number} - variant.{test}", file=log,
                      flush=True)
        subprocess.run(["rmmod", "vfio_membar", "vfio_pci_test"], check=True)


def suite(paths, *options):
    """Runs the conformance suite, and returns whether it fails."""
    other = find(IVSHMEM)[0]
    for path in (*paths, other):
        bind(path)
    done = subprocess.run([f"{sys.argv[1]}/vfio_migration_test", *map(str, paths),
                           "--other", str(other), *options, *sys.argv[3:]], check=False)
    for path in (*paths, other):
        unbind(path)
    return done.returncode != 0


def main():
    """Runs all tests."""
    for module in ("vfio_iommu_type1", "iommufd"):
        # The machine has no interrupt remapping.
        file = Path(f"/sys/module/{module}/parameters/allow_unsafe_interrupts")
        file.write_text("1")
    subprocess.run(["modprobe", "vfio-pci-core"], check=True)
    if sys.argv[1] == "--mutants":
        mutants(*sys.argv[2:])
        return
    subprocess.run(["insmod", HERE / "vfio_pci_test.ko"], check=True)
    subprocess.run(["insmod", sys.argv[2]], check=True)
    only = sys.argv[sys.argv.index("--only") + 1 :] if "--only" in sys.argv else None
    tests = [entry for entry in [(aliases, BOCHS, "vfio_membar"), *TESTS]
             if only is None or entry[0].__name__ in only]
    print("TAP version 13")
    print(f"1..{len(tests)}")
    failed = False
    for number, (test, kind, label) in enumerate(tests, 1):
        passes = attempt(test, kind)
        failed |= not passes
        print(f"{'' if passes else 'not '}ok {number} - {label}: {test.__doc__}", flush=True)
    if only is None:
        scratch = f"{PAGE}:{16 * PAGE}"
        pair = find(BOCHS)
        failed |= suite(pair, "--scratch", f"0:{scratch}")
        # Without a second device: the addresses in the configuration space differ.
        failed |= suite(pair[:1], "--read-regions", "-t", "regions_survive_migration")
    subprocess.run(["rmmod", "vfio_membar", "vfio_pci_test"], check=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
