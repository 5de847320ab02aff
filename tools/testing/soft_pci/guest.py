#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Test software PCI functions.

guest.py PROGRAMS MODULE [OPTION...]
guest.py PROGRAMS MODULE --only TEST...

Runs in the test machine as root. PROGRAMS is the folder of the built kselftests, MODULE
is vfio_mock.ko. OPTIONs are for run_mock.sh. Prints TAP. With --only, runs only the
functions TEST of this file, for tools/testing/mutate.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

CONFIG = Path("/sys/kernel/config/vfio_mock")
DEVICES = Path("/sys/bus/pci/devices")
DRIVER = Path("/sys/bus/pci/drivers/vfio_mock")
TRACING = Path("/sys/kernel/tracing")
MODULE = Path(sys.argv[2])

# Ioctls, and the region of the configuration space.
VFIO_DEVICE_GET_REGION_INFO = 0x3B6C
VFIO_DEVICE_FEATURE = 0x3B75
VFIO_DEVICE_BIND_IOMMUFD = 0x3B76
PROBE_LOG = 1 << 18 | 1 << 17 | 6
GET_MIGRATION = 1 << 16 | 1
REGION = 7
NETLINK_KOBJECT_UEVENT = 15
# In the configuration space.
COMMAND, STATUS, BAR0, CAPABILITIES = 4, 6, 0x10, 0x34
CAP_PM, CAP_EXP, CAP_MSIX = 1, 0x10, 0x11


def check(condition, what):
    """Fails with `what` unless the condition holds."""
    if not condition:
        raise AssertionError(what)


@contextlib.contextmanager
def refused(number):
    """Fails unless the body fails with this error."""
    try:
        yield
    except OSError as error:
        check(error.errno == number, f"{error}, expected {errno.errorcode[number]}")
        return
    raise AssertionError(f"no error, expected {errno.errorcode[number]}")


def wait(condition, what):
    """Waits until the condition holds, for a minute."""
    end = time.monotonic() + 60
    while not condition():
        check(time.monotonic() < end, f"timeout: {what}")
        time.sleep(0.01)


class Skip(Exception):
    """The reason why a test does not run."""


class Function:
    """A function, and its directory in configfs."""

    def __init__(self, name, power=True, **settings):
        self.directory = CONFIG / name
        self.directory.mkdir()
        for key, value in settings.items():
            self.set(key, value)
        if power:
            self.set("power", 1)

    def set(self, key, value):
        """Writes a file."""
        (self.directory / key).write_text(f"{value}\n")

    def get(self, key):
        """Reads a file."""
        return (self.directory / key).read_text().strip()

    @property
    def path(self):
        """The directory of the function in sysfs, which exists while it is plugged."""
        return DEVICES / self.get("address")

    def driver(self):
        """Returns the name of the driver that it is bound to, if any."""
        link = self.path / "driver"
        return os.readlink(link).rpartition("/")[2] if link.exists() else None

    def remove(self):
        """Removes the directory."""
        if self.directory.exists():
            self.directory.rmdir()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()


class Device:
    """A function opened with an iommufd."""

    def __init__(self, function):
        node = next((function.path / "vfio-dev").iterdir()).name
        self.iommu = os.open("/dev/iommu", os.O_RDWR)
        try:
            self.file = os.open(f"/dev/vfio/devices/{node}", os.O_RDWR)
            bind = bytearray(struct.pack("<IIiI", 16, 0, self.iommu, 0))
            fcntl.ioctl(self.file, VFIO_DEVICE_BIND_IOMMUFD, bind)
        except OSError:
            os.close(self.iommu)
            raise

    def region(self, index):
        """Returns the size and the offset of a region."""
        info = bytearray(struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self.file, VFIO_DEVICE_GET_REGION_INFO, info)
        return struct.unpack("<IIIIQQ", info)[4:]

    def config(self):
        """Returns the content of the configuration space."""
        size, offset = self.region(REGION)
        return os.pread(self.file, size, offset)

    def has_log(self):
        """Returns whether the device has a DMA log."""
        try:
            fcntl.ioctl(self.file, VFIO_DEVICE_FEATURE, bytearray(struct.pack("<II", 8, PROBE_LOG)))
        except OSError as error:
            check(error.errno == errno.ENOTTY, f"probe of the log: {error}")
            return False
        return True

    def migration_flags(self):
        """Returns the flags of VFIO_DEVICE_FEATURE_MIGRATION."""
        feature = bytearray(struct.pack("<IIQ", 16, GET_MIGRATION, 0))
        fcntl.ioctl(self.file, VFIO_DEVICE_FEATURE, feature)
        return struct.unpack("<IIQ", feature)[2]

    def close(self):
        """Closes the device."""
        os.close(self.file)
        os.close(self.iommu)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def capabilities(config):
    """Returns the capabilities in a configuration space, with their offsets."""
    check(config[STATUS] & 0x10, "there is no list of capabilities")
    found, at = {}, config[CAPABILITIES]
    while at:
        found[config[at]] = at
        at = config[at + 1]
        check(len(found) < 10, f"the list of capabilities has no end: {found}")
    return found


def identity():
    """a function has an address, addresses for its BARs, capabilities, and a group of its own"""
    with Function("one", type="1M") as one, Function("two", type="64K") as two:
        for function in one, two:
            domain = int(function.get("address").partition(":")[0], 16)
            check(0x1000 <= domain <= 0xFFFF, f"domain {domain:#x}")
            group = list((function.path / "iommu_group/devices").iterdir())
            check([member.name for member in group] == [function.path.name], f"group {group}")
            kind = (function.path / "iommu_group/type").read_text().strip()
            check(kind == "identity", f"the default domain is {kind}")
        check(one.path != two.path, "two functions have the same address")
        lines = (one.path / "resource").read_text().splitlines()
        sizes = []
        for line in lines:
            first, last, flags = (int(word, 16) for word in line.split())
            sizes.append(last - first + 1 if flags else 0)
            check(not flags or first % (last - first + 1) == 0 and first >> 32, f"BAR {line}")
        check(sizes[:6] == [0x4000, 0, 1 << 20, 0, 0, 0], f"sizes of BARs: {sizes}")
        config = (one.path / "config").read_bytes()
        check(len(config) == 4096, f"{len(config)} bytes of configuration space")
        check(set(capabilities(config)) == {CAP_MSIX, CAP_PM, CAP_EXP}, "other capabilities")
        with Device(one) as device:
            own = device.config()
        check(len(own) == 4096, f"the user sees {len(own)} bytes of configuration space")
        check(capabilities(own) == capabilities(config), "the user sees other capabilities")


def registers():
    """the host accesses registers in any size, and writes only their writable bits"""
    with Function("one", bind=0) as one, open(one.path / "config", "r+b", buffering=0) as file:
        def put(offset, data, want):
            os.pwrite(file.fileno(), data, offset)
            got = os.pread(file.fileno(), len(want), offset)
            check(got == want, f"{got.hex()} at {offset:#x}, expected {want.hex()}")

        start = os.pread(file.fileno(), 64, 0)
        put(0, b"\xff" * 4, start[:4])
        put(BAR0, b"\xff" * 8, struct.pack("<q", -0x4000 | start[BAR0] & 0xF))
        put(BAR0, start[BAR0:BAR0 + 8], start[BAR0:BAR0 + 8])
        put(COMMAND, b"\x06\0", b"\x06\0" + start[STATUS:STATUS + 2])
        # The interrupt disable bit, in the second byte.
        put(COMMAND + 1, b"\x04", b"\x04")
        put(COMMAND, b"\x02", b"\x02\x04" + start[STATUS:STATUS + 2])


def events():
    """user space is told that a function is plugged, bound, unbound and unplugged"""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) as netlink:
        netlink.bind((0, 1))
        netlink.settimeout(60)
        with Function("one") as one:
            name = one.path.name
        actions = []
        while "remove" not in actions:
            action, _, path = netlink.recv(65536).split(b"\0")[0].decode().partition("@")
            if path.endswith(f"/{name}"):
                actions.append(action)
        check(actions == ["add", "bind", "unbind", "remove"], f"events {actions}")


def settings():
    """settings are checked, and constant while a function is plugged"""
    with Function("one", power=False) as one:
        check(one.get("type") == "64K", "the default is not the first type")
        with refused(errno.ENODEV):
            one.get("address")
        for key, value in (("type", "1"), ("type", ""), ("dma_log", "x"), ("power", "")):
            with refused(errno.EINVAL):
                one.set(key, value)
        one.set("type", "16M")
        one.set("power", 1)
        one.set("power", 1)
        for key, value in (("type", "64K"), ("dma_log", 0), ("bind", 0)):
            with refused(errno.EBUSY):
                one.set(key, value)
        check(one.get("power") == "1", "the function is not plugged")
        path = one.path
        one.set("power", 0)
        check(not path.exists(), "the function is still there")
        one.set("power", 0)
        one.set("type", "64K")
        with refused(errno.EEXIST):
            one.directory.mkdir()


def defaults():
    """a function begins with its defaults whenever its driver is bound, and no other one does"""
    text = "dirty_rate=1048576, faults=seal errno=ENOSPC; read after=7,migration_flags=3,dma_log=0"
    want = {"dirty_rate": "1048576", "faults": "seal errno=ENOSPC; read after=7 errno=EIO",
            "migration_flags": "3", "dma_log": "0", "save_rate": "0"}
    with Function("one", power=False) as one, Function("two") as two:
        check(one.get("defaults") == "", "there are defaults")
        one.set("defaults", text)
        for bad in ("rate=7", "dirty_rate", "dirty_rate=x", "dirtied=7", "save_rate=7,faults=on",
                    "migration_flags=2", "dma_log=2", "dirty_span=65537"):
            with refused(errno.EINVAL):
                one.set("defaults", bad)
            check(one.get("defaults") == text, f"{bad} has changed the defaults")
        with refused(errno.E2BIG):
            one.set("defaults", "dirty_rate=7,".ljust(4095, ",") + "save_rate=7")
        check(one.get("defaults") == text, "a part of a long text has changed the defaults")
        with refused(errno.EINVAL):
            one.set("defaults", "dirty_rate=7\0")
        one.set("type", "1M")
        one.set("defaults", f"{text},dirty_span=65537")
        one.set("type", "64K")
        with refused(errno.EINVAL):
            one.set("power", 1)
        one.set("defaults", text)
        one.set("power", 1)
        with refused(errno.EBUSY):
            one.set("defaults", "save_rate=7")
        for again in range(2):
            for name, value in want.items():
                got = (one.path / "knobs" / name).read_text().strip()
                check(got == value, f"{name} is {got} at bind {again}")
            (one.path / "knobs/dirty_rate").write_text("7")
            (DRIVER / "unbind").write_text(one.path.name)
            (DRIVER / "bind").write_text(one.path.name)
        with Device(one) as first, Device(two) as second:
            check(first.migration_flags() == 3, "the flags have no effect")
            check(second.migration_flags() == 7, "another function has the flags")
            check(not first.has_log() and second.has_log(), "dma_log is for the wrong function")
        check((two.path / "knobs/faults").read_text() == "off\n", "another function has faults")
        with refused(errno.EACCES):
            (one.path / "knobs/migration_flags").write_text("7")
    with Function("one") as one:
        check((one.path / "knobs/dirty_rate").read_text() == "0\n", "the defaults are left")


def drivers():
    """a function is bound by choice, by driver_override and by bind, and to no other driver"""
    with Function("one", bind=0) as one:
        check(one.driver() is None, "it is bound")
        (one.path / "driver_override").write_text("vfio_mock")
        Path("/sys/bus/pci/drivers_probe").write_text(one.path.name)
        check(one.driver() == "vfio_mock", "driver_override has no effect")
        (one.path / "knobs/save_delay_us").write_text("7")
        check((one.path / "knobs/save_delay_us").read_text() == "7\n", "the setting is not kept")
        (DRIVER / "unbind").write_text(one.path.name)
        check(not (one.path / "knobs/save_delay_us").exists(), "a setting is left")
        (DRIVER / "bind").write_text(one.path.name)
        check((one.path / "knobs/save_delay_us").read_text() == "0\n", "the device is not new")
    with Function("two") as two:
        check(two.driver() == "vfio_mock", "it is not bound")
    # Not a function of this bus.
    other = next(path for path in sorted(DEVICES.iterdir()) if not (path / "driver").exists())
    (other / "driver_override").write_text("vfio_mock")
    with refused(errno.ENODEV):
        (DRIVER / "bind").write_text(other.name)
    (other / "driver_override").write_text("\n")


def driverctl():
    """driverctl binds a function to its driver, and lists it"""
    if not shutil.which("driverctl"):
        raise Skip("there is no driverctl")
    with Function("one", bind=0) as one:
        address = one.path.name
        # No files: /etc cannot be written to.
        subprocess.run(["driverctl", "--nosave", "set-override", address, "vfio_mock"], check=True)
        check(one.driver() == "vfio_mock", "it is not bound")
        done = subprocess.run(["driverctl", "list-overrides"], check=True,
                              capture_output=True, text=True)
        check(f"{address} vfio_mock" in done.stdout.splitlines(), done.stdout)


def aliases():
    """the module has an alias for driver_override"""
    text = subprocess.run(["modinfo", "-F", "alias", MODULE], check=True,
                          capture_output=True, text=True).stdout
    check("vfio_pci:v00001AF4d000010F0sv*sd*bc*sc*i*" in text.split(), text)


def others():
    """vfio-pci can be bound, but there is nothing in the BARs"""
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    with Function("one") as one:
        (one.path / "driver/unbind").write_text(one.path.name)
        for found in "plugged", "scanned":
            (one.path / "driver_override").write_text("vfio-pci")
            Path("/sys/bus/pci/drivers_probe").write_text(one.path.name)
            check(one.driver() == "vfio-pci", f"{found}: vfio-pci does not bind")
            with Device(one) as device:
                os.pwrite(device.file, b"\2\0", device.region(REGION)[1] + COMMAND)
                with refused(errno.ENODEV):
                    os.pread(device.file, 4, device.region(0)[1])
            (one.path / "remove").write_text("1")
            Path("/sys/bus/pci/rescan").write_text("1")


def logs():
    """a function without a DMA log has no such feature"""
    with Function("one", dma_log=0) as one, Function("two") as two:
        with Device(one) as device:
            check(not device.has_log(), "it has a log")
        with Device(two) as device:
            check(device.has_log(), "it has no log")


def removals():
    """a function can be removed in any state, and the bus finds it again while it is plugged"""
    with Function("one") as one:
        path = one.path
        (path / "remove").write_text("1")
        check(not path.exists(), "it is still there")
        Path("/sys/bus/pci/rescan").write_text("1")
        check(path.exists(), "a scan does not find it")
        (path / "remove").write_text("1")
        one.set("power", 0)
        Path("/sys/bus/pci/rescan").write_text("1")
        check(not path.exists(), "a scan finds an empty slot")
        one.set("power", 1)
        (path / "driver/unbind").write_text(path.name)
    check(not path.exists(), "an unbound function survives its directory")
    with Function("one") as one:
        check(one.path == path, "the slot is not used again")
        device = Device(one)
        waiter = threading.Thread(target=one.set, args=("power", 0))
        waiter.start()
        # Another function does not wait for the user of this one.
        with Function("two") as two:
            check(two.path.exists(), "two")
        time.sleep(0.5)
        check(waiter.is_alive() and path.exists(), "unplugging does not wait for the user")
        check(one.get("power") == "1" and one.path == path, "it has left the bus too early")
        for key, value in ("power", 0), ("power", 1), ("bind", 0):
            with refused(errno.EBUSY):
                one.set(key, value)
        device.close()
        waiter.join(60)
        check(not waiter.is_alive(), "unplugging hangs")
        check(one.get("power") == "0" and not path.exists(), "it is not unplugged")
    check(not list(CONFIG.iterdir()), "directories are left")


def limits():
    """there are as many functions as slots, or as the module allows"""
    with contextlib.ExitStack() as stack:
        functions = [stack.enter_context(Function(f"n{number}")) for number in range(32)]
        check(len({function.path for function in functions}) == 32, "addresses are not unique")
        last = stack.enter_context(Function("last", power=False))
        with refused(errno.ENOSPC):
            last.set("power", 1)
        functions[5].set("power", 0)
        last.set("power", 1)
    subprocess.run(["rmmod", "vfio_mock"], check=True)
    subprocess.run(["insmod", MODULE, "max_instances=1"], check=True)
    try:
        with Function("one") as one, Function("two", power=False) as two:
            with refused(errno.ENOSPC):
                two.set("power", 1)
            one.set("power", 0)
            two.set("power", 1)
    finally:
        subprocess.run(["rmmod", "vfio_mock"], check=True)
        subprocess.run(["insmod", MODULE], check=True)


def unload():
    """directories keep the module loaded, and scans of the bus do not"""
    with Function("one", power=False):
        done = subprocess.run(["rmmod", "vfio_mock"], check=False, capture_output=True)
        check(done.returncode != 0, "the module is unloaded")
    end = threading.Event()

    def scan():
        while not end.is_set():
            for bus in Path("/sys/class/pci_bus").glob("1*:00"):
                with contextlib.suppress(OSError):
                    (bus / "rescan").write_text("1")

    thread = threading.Thread(target=scan)
    thread.start()
    try:
        for _ in range(3):
            subprocess.run(["rmmod", "vfio_mock"], check=True)
            subprocess.run(["insmod", MODULE], check=True)
            with Function("one") as one:
                check(one.driver() == "vfio_mock", "it is not bound")
    finally:
        end.set()
        thread.join()


def rebinding():
    """a function that is being unplugged cannot be bound again, to any driver"""
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    with Function("one") as one, Function("two") as two:
        path, other = one.path, two.path
        device = Device(two)
        # It waits for the user, with the lock of the PCI core held.
        remover = threading.Thread(target=(other / "remove").write_text, args=("1",))
        remover.start()
        waiter = threading.Thread(target=one.set, args=("power", 0))
        try:
            wait(lambda: not any((other / "vfio-dev").glob("*")), "the removal of two")
            waiter.start()
            wait(lambda: not (path / "driver").exists(), "the driver of one")
            for driver in DRIVER, DRIVER.with_name("vfio-pci"):
                (path / "driver_override").write_text(driver.name)
                with refused(errno.ENODEV):
                    (driver / "bind").write_text(path.name)
            check(waiter.is_alive() and remover.is_alive(), "the removal does not wait")
        finally:
            device.close()
            remover.join(60)
            if waiter.ident:
                waiter.join(60)
        check(not path.exists() and not other.exists(), "they are still there")
        one.set("power", 1)
        check(one.driver() == "vfio_mock", "it cannot be bound any more")


def reading():
    """a task that reads a file of a function that is being plugged can be killed"""
    with Function("one", power=False) as one, Function("two") as two:
        other = two.path
        device = Device(two)
        # It waits for the user, with the lock of the PCI core held.
        remover = threading.Thread(target=(other / "remove").write_text, args=("1",))
        remover.start()
        plugger = threading.Thread(target=one.set, args=("power", 1))
        reader = None
        try:
            wait(lambda: not any((other / "vfio-dev").glob("*")), "the removal of two")
            plugger.start()
            time.sleep(1)
            reader = subprocess.Popen(["cat", one.directory / "bind"])
            status = Path(f"/proc/{reader.pid}/status")
            wait(lambda: "State:\tD" in status.read_text(), "the wait of the reader")
            time.sleep(1)
            check(plugger.is_alive() and reader.poll() is None, "nothing waits")
            reader.kill()
            wait(lambda: reader.poll() is not None, "the end of the reader")
        finally:
            device.close()
            remover.join(60)
            if plugger.ident:
                plugger.join(60)
            if reader:
                reader.wait()
        check(one.driver() == "vfio_mock", "it is not plugged")


def locking():
    """the IOMMU is registered and unregistered while no function can be plugged"""
    if not os.path.ismount(TRACING):
        subprocess.run(["mount", "-t", "tracefs", "none", TRACING], check=True)
    if not (TRACING / "kprobe_events").exists():
        raise Skip("there are no kprobes")

    def probe(text):
        # Without truncation, which removes all probes.
        file = os.open(TRACING / "kprobe_events", os.O_WRONLY)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    probes = {"lock": "pci_lock_rescan_remove", "unlock": "pci_unlock_rescan_remove",
              "register": "iommu_device_register", "unregister": "iommu_device_unregister"}
    with contextlib.ExitStack() as stack:
        for name, function in probes.items():
            probe(f"p:soft_pci_test/{name} {function}")
            stack.callback(probe, f"-:soft_pci_test/{name}")
        enable = TRACING / "events/soft_pci_test/enable"
        (TRACING / "trace").write_text("")
        enable.write_text("1")
        stack.callback(enable.write_text, "0")
        subprocess.run(["rmmod", "vfio_mock"], check=True)
        subprocess.run(["insmod", MODULE], check=True)
        enable.write_text("0")
        lines = (TRACING / "trace").read_text().splitlines()
    matches = (re.search(r" (?:rm|ins)mod-.*: (\w+): ", line) for line in lines)
    calls = [found[1] for found in matches if found]
    for name in "register", "unregister":
        check(calls.count(name) == 1, f"calls: {calls}")
        before = [call for call in calls[:calls.index(name)] if call.endswith("lock")]
        check(before[-1:] == ["lock"], f"{name} without the lock: {calls}")


def races():
    """plugging, binding, opening and scanning race"""
    end = time.monotonic() + 10

    # A write to "remove" during another removal is a fault in the PCI core of Linux 7.3, see
    # tools/series/fixes/4-pci-remove.patch.
    removing = threading.Lock()

    def plug(name):
        with Function(name, power=False) as function:
            while time.monotonic() < end:
                function.set("power", 1)
                with removing:
                    function.set("power", 0)

    def on_all(act):
        while time.monotonic() < end:
            for path in DEVICES.glob("1*:00:*.0"):
                with contextlib.suppress(OSError, StopIteration):
                    act(path)

    def use(path):
        node = next((path / "vfio-dev").iterdir()).name
        with open(f"/dev/vfio/devices/{node}", "r+b", buffering=0) as file, \
                open("/dev/iommu", "r+b", buffering=0) as iommu:
            fcntl.ioctl(file, VFIO_DEVICE_BIND_IOMMUFD,
                        bytearray(struct.pack("<IIiI", 16, 0, iommu.fileno(), 0)))

    def rebind(path):
        (DRIVER / "unbind").write_text(path.name)
        (DRIVER / "bind").write_text(path.name)

    def rescan(path):
        with removing:
            (path / "remove").write_text("1")
        Path("/sys/bus/pci/rescan").write_text("1")

    threads = [threading.Thread(target=plug, args=(f"race{number}",)) for number in range(3)]
    threads += [threading.Thread(target=on_all, args=(act,)) for act in (use, rebind, rescan)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    check(not any(thread.is_alive() for thread in threads), "a thread hangs")
    with Function("one") as one, Device(one) as device:
        check(len(device.config()) == 4096, "the function does not work")


def qemu():
    """QEMU takes a function by its address, with a container and with an iommufd"""
    requests = "".join(json.dumps({"execute": name}) + "\n"
                       for name in ("qmp_capabilities", "query-pci", "quit"))
    with Function("one", type="1M") as one:
        device = f"vfio-pci,host={one.path.name},enable-migration=on"
        for options in (["-device", device],
                        ["-object", "iommufd,id=iommufd0",
                         "-device", f"{device},iommufd=iommufd0"]):
            done = subprocess.run(
                ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "32M", "-S",
                 "-nodefaults", "-display", "none", "-qmp", "stdio", *options],
                input=requests, capture_output=True, text=True, timeout=300, check=False)
            check(done.returncode == 0, f"{options}: {done.stderr}")
            # QEMU 11.1 warns that the function has no dma-bufs.
            other = [line for line in done.stderr.splitlines()
                     if "P2P DMA will not work" not in line]
            check(not other, f"{options}: {other}")
            reply = [json.loads(line).get("return") for line in done.stdout.splitlines()]
            buses = next(value for value in reply if isinstance(value, list))
            found = [entry["id"] for entry in buses[0]["devices"]]
            check(any(entry["vendor"] == 0x1AF4 and entry["device"] == 0x10F0
                      for entry in found), f"devices {found}")


TESTS = (identity, registers, events, settings, defaults, drivers, driverctl, aliases, others,
         logs, removals, rebinding, reading, limits, qemu, unload, locking, races)


def suite():
    """Runs the tests of the mock on functions, and returns whether they fail."""
    script = Path(__file__).parents[1] / "selftests/vfio_migration/run_mock.sh"
    return subprocess.run([script, "--functions", "-b", sys.argv[1], "-m", MODULE, *sys.argv[3:]],
                          check=False).returncode != 0


def main():
    """Runs all tests."""
    if not os.path.ismount(CONFIG.parent):
        subprocess.run(["mount", "-t", "configfs", "none", CONFIG.parent], check=True)
    if not CONFIG.exists():
        subprocess.run(["insmod", MODULE], check=True)
    only = sys.argv[4:] if sys.argv[3:4] == ["--only"] else None
    tests = [test for test in TESTS if only is None or test.__name__ in only]
    print("TAP version 13")
    print(f"1..{len(tests)}")
    failed = False
    for number, test in enumerate(tests, 1):
        text = f"{number} - soft_pci.{test.__name__}: {test.__doc__}"
        try:
            test()
            print(f"ok {text}", flush=True)
        except Skip as reason:
            print(f"ok {text} # SKIP {reason}", flush=True)
        except (AssertionError, OSError, subprocess.CalledProcessError, StopIteration) as error:
            print(f"# {error!r}\nnot ok {text}", flush=True)
            failed = True
    if only is None:
        failed |= suite()
    sys.exit(failed)


if __name__ == "__main__":
    main()
