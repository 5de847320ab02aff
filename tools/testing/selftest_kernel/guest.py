#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Run the VFIO selftests of the kernel on devices of the test machine.

guest.py PROGRAMS MODULES DEVICE:PROGRAM:BUILD...

Runs in the test machine as root. PROGRAMS is the folder that `build` has filled, MODULES
that of vfio_membar.ko and others. Prints the output of each PROGRAM between the lines "run: DEVICE PROGRAM BUILD" and "status: NUMBER".
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from itertools import groupby
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
# Any address of no device.
MADE_UP = "0000:7f:00.0"
# Runs a program that sees this folder instead of that of the PCI devices.
COVER = ("unshare", "--mount", "sh", "-c",
         f'mount --bind "$1" {PCI} && shift && exec "$@"', "sh")


class Pci:
    """A PCI device of QEMU, bound to a driver."""

    def __init__(self, vendor, device, driver):
        self.ids = (vendor, device)
        self.driver = driver

    @contextlib.contextmanager
    def ready(self):
        """Binds the device and returns the start of a command and the address."""
        def is_of_kind(path):
            return self.ids == tuple(int((path / name).read_text(), 0)
                                     for name in ("vendor", "device"))

        path, = filter(is_of_kind, PCI.iterdir())
        (path / "driver_override").write_text(self.driver)
        Path("/sys/bus/pci/drivers_probe").write_text(path.name)
        if Path(os.readlink(path / "driver")).name != self.driver:
            sys.exit(f"{path.name} is not bound to {self.driver}")
        yield [], path.name
        (path / "driver/unbind").write_text(path.name)
        (path / "driver_override").write_text("\n")


class Function:
    """A software PCI function, bound to its driver."""

    def __init__(self, driver, kind):
        self.directory = Path("/sys/kernel/config") / driver / "test"
        self.kind = kind

    @contextlib.contextmanager
    def ready(self):
        """Creates the function and returns the start of a command and the address."""
        self.directory.mkdir()
        for file, value in ("type", self.kind), ("power", "1"):
            (self.directory / file).write_text(value)
        yield [], (self.directory / "address").read_text().strip()
        self.directory.rmdir()


class Mdev:
    """A mediated device. The programs find devices by the address of a PCI device.

    They see a folder of PCI devices with one made-up address. It has the two IDs, and
    leads to the group and the character device of the mediated device.
    """

    def __init__(self, driver, kind, vendor, device):
        self.types = Path(f"/sys/class/mdev_bus/{driver}/mdev_supported_types")
        self.kind = f"{driver}-{kind}"
        self.ids = {"vendor": vendor, "device": device}

    @contextlib.contextmanager
    def ready(self):
        """Creates the device and returns the start of a command and the address."""
        name = str(uuid.uuid4())
        (self.types / self.kind / "create").write_text(name)
        path = Path("/sys/bus/mdev/devices") / name
        with tempfile.TemporaryDirectory() as folder:
            fake = Path(folder) / MADE_UP
            fake.mkdir()
            for file, value in self.ids.items():
                (fake / file).write_text(f"{value:#06x}\n")
            for link in ("vfio-dev", "iommu_group"):
                (fake / link).symlink_to((path / link).resolve())
            yield [*COVER, folder], MADE_UP
        (path / "remove").write_text("1")


DEVICES = {
    "bochs-display/vfio_membar": Pci(0x1234, 0x1111, "vfio_membar"),
    "bochs-display/vfio-pci": Pci(0x1234, 0x1111, "vfio-pci"),
    "ivshmem-plain/vfio_membar": Pci(0x1AF4, 0x1110, "vfio_membar"),
    "ivshmem-plain/vfio-pci": Pci(0x1AF4, 0x1110, "vfio-pci"),
    "igb/vfio-pci": Pci(0x8086, 0x10C9, "vfio-pci"),
    "function/vfio_mock": Function("vfio_mock", "1M"),
    "mdev/vfio_mock": Mdev("vfio_mock", "1M", 0x1AF4, 0x10F0),
    "mdev/vfio_minimal": Mdev("vfio_minimal", "64K", 0x1AF4, 0x10F1),
    "mdev/mtty": Mdev("mtty", "1", 0x4348, 0x3253),
}


def load(modules):
    """Loads the drivers."""
    for module in ("vfio_iommu_type1", "iommufd"):
        # The machine has no interrupt remapping.
        file = Path(f"/sys/module/{module}/parameters/allow_unsafe_interrupts")
        file.write_text("1")
    if not os.path.ismount("/sys/kernel/config"):
        subprocess.run(["mount", "-t", "configfs", "none", "/sys/kernel/config"], check=True)
    for command in (("modprobe", "mtty"), ("modprobe", "vfio-pci"),
                    ("insmod", f"{modules}/vfio_membar.ko"),
                    ("insmod", f"{modules}/vfio_mock.ko"),
                    ("insmod", f"{modules}/vfio_minimal.ko")):
        subprocess.run(command, check=True)


def main():
    """Runs all."""
    programs, modules, *wanted = sys.argv[1:]
    load(modules)
    patient = os.environ | {"LD_PRELOAD": f"{programs}/timeout.so"}
    for label, runs in groupby((word.split(":") for word in wanted), lambda run: run[0]):
        with DEVICES[label].ready() as (start, address):
            for _, name, build in runs:
                print(f"run: {label} {name} {build}", flush=True)
                done = subprocess.run([*start, f"{programs}/{build}/{name}", address],
                                      env=patient, stderr=subprocess.STDOUT, check=False)
                print(f"status: {done.returncode}", flush=True)


main()
