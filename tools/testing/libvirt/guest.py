#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Migrate a domain with a device between two libvirt daemons.

guest.py ROOT HOSTNAME

Runs in the test machine as root, with vfio_mock loaded. ROOT has the packages of
libvirt unpacked, HOSTNAME is the library made of hostname.c. Each daemon is a host
of its own: a mount namespace with its own folders, a host name, and a UUID. Prints
TAP.
"""

import base64
import ctypes
import os
import re
import socket
import struct
import subprocess
import sys
import time
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = Path("/run/libvirt-test")
DEVICES = Path("/sys/bus/mdev/devices")
# libvirt's drivers, and a folder that has only the one of QEMU.
DRIVERS = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver")
QEMU_DRIVER = WORK / "drivers"
# Where the firmware of q35 puts the configuration space of PCI.
ECAM = 0xB0000000
SEED = 0x5EEDC0DE
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# What a libvirt daemon keeps for itself.
FOLDERS = (
    "/etc/libvirt",
    "/run/libvirt",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
)
# The machine has no cgroups, no users and nothing to protect from the guest.
QEMU_CONF = """
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NS)

# libvirt's driver of node devices does not start without.
has_inotify = ctypes.CDLL(None).inotify_init() >= 0


class Skipped(Exception):
    """A test cannot be done on this kernel."""


class Failed(Exception):
    """A test found something wrong."""


def check(condition, what):
    """Fails with `what` unless the condition holds."""
    if not condition:
        raise Failed(what)


def run(*command, ok=True):
    """Runs a command to its end and returns what it printed, or how it failed."""
    command = [str(word) for word in command]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
    check((done.returncode == 0) == ok, said)
    return done.stdout.strip() if ok else said


class Host:
    """A libvirt daemon that believes to be alone on its host."""

    def __init__(self, name):
        self.name = name
        self.folder = WORK / name
        for path in FOLDERS:
            self.place(path).mkdir(parents=True)
            Path(path).mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log"
        conf = {
            "unix_sock_dir": self.folder,
            "auth_unix_rw": "none",
            "log_outputs": "3:stderr",
            "host_uuid": uuid.uuid4(),
        }
        lines = "".join(f'{key} = "{value}"\n' for key, value in conf.items())
        (self.place("/etc/libvirt") / "libvirtd.conf").write_text(lines)
        (self.place("/etc/libvirt") / "qemu.conf").write_text(QEMU_CONF)
        script = f"export TEST_HOSTNAME={name} LD_PRELOAD={sys.argv[2]}\n"
        if not has_inotify:
            script += f"export LIBVIRT_DRIVER_DIR={QEMU_DRIVER}\n"
        for path in FOLDERS:
            script += f"mount --bind {self.place(path)} {path}\n"
        script += f"exec libvirtd --pid-file {self.folder}/pid\n"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "bash", "-ec", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def place(self, path):
        """Where the daemon's own folder is for all others."""
        return self.folder / path.lstrip("/").replace("/", "-")

    @property
    def uri(self):
        """How to connect to the daemon."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    def wait(self):
        """Returns once the daemon takes connections."""
        deadline = time.monotonic() + 120
        while not (self.folder / "libvirt-sock").exists():
            check(
                self.process.poll() is None, f"libvirtd ended: {self.log.read_text()}"
            )
            check(time.monotonic() < deadline, f"{self.name}: no socket in 120 s")
            time.sleep(0.1)

    def virsh(self, *command, ok=True):
        """Runs virsh with the daemon."""
        return run("virsh", "-q", "-c", self.uri, *command, ok=ok)

    def appears(self, device, capability):
        """Waits for a node device, of which udev tells, and returns its name."""
        device = device.replace("-", "_")
        deadline = time.monotonic() + 60
        while True:
            listed = self.virsh("nodedev-list", "--cap", capability).split()
            for name in listed:
                if device in name:
                    return name
            check(
                time.monotonic() < deadline, f"{self.name} lists {listed}, no {device}"
            )
            time.sleep(0.2)

    def domains(self):
        """The names of the domains that run, or are there but paused."""
        return self.virsh("list", "--name").split()


class Qtest:
    """What a guest could do, without one: accesses to ports and memory."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rw")

    def close(self):
        """Ends the connection."""
        self.file.close()
        self.socket.close()

    def command(self, *words):
        """Runs a command and returns the words behind its OK."""
        line = " ".join(w if isinstance(w, str) else hex(w) for w in words)
        print(line, file=self.file, flush=True)
        answer = self.file.readline().split()
        check(answer[:1] == ["OK"], f"qtest: {words[0]}: {answer}")
        return answer[1:]

    def config(self, bus, offset):
        """Reads a register of the configuration space of device 0 of a bus, not by
        the ports, which the firmware uses at the same time."""
        return int(self.command("readl", ECAM + (bus << 20) + offset)[0], 16)

    def read(self, address, length):
        """Reads memory."""
        return base64.b64decode(self.command("b64read", address, length)[0])


class Mock:
    """The device as the guest has it, found behind one of the root ports."""

    def __init__(self, qtest):
        self.qtest = qtest
        for bus in range(1, 16):
            if qtest.config(bus, 0) == 0x10F01AF4:
                break
        else:
            raise Failed("the guest has no such device")
        check(qtest.config(bus, 4) & 2, "the firmware has not enabled the device")
        bars = [qtest.config(bus, 0x10 + 4 * n) for n in range(4)]
        self.regs = (bars[1] << 32 | bars[0]) & ~0xF
        self.memory = (bars[3] << 32 | bars[2]) & ~0xF
        check(self.regs and self.memory, f"the firmware did not place the BARs: {bars}")
        check(self.get(0, "l") == 0x4B4D4656, "this is no vfio_mock")
        self.size = self.get(8)

    def get(self, offset, width="q"):
        """Reads a register."""
        return int(self.qtest.command(f"read{width}", self.regs + offset)[0], 16)

    def set(self, offset, value, width="q"):
        """Writes a register."""
        self.qtest.command(f"write{width}", self.regs + offset, value)

    def execute(self, command, seed=0):
        """Has the device execute a command on all of its memory."""
        self.set(0x20, 0)
        self.set(0x28, self.size)
        self.set(0x30, seed)
        self.set(0x38, command, "l")
        check(self.get(0x14, "l") & 6 == 2, "the device refuses the command")

    def holds_pattern(self, seed):
        """Checks every byte, as the device sees it and as the guest does."""
        words = pattern(seed, self.size)
        self.execute(2)
        check(self.get(0x40) == checksum(words), "another checksum")
        start = self.size - 65536
        seen = self.qtest.read(self.memory + start, 65536)
        check(seen == struct.pack("<8192Q", *words[start // 8 :]), "other bytes")


def pattern(seed, size):
    """The words of the pattern that the command fill writes."""
    words = []
    for number in range(1, size // 8 + 1):
        z = seed + number * GOLDEN & WORD
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
        words.append(z ^ z >> 31)
    return words


def checksum(words):
    """The checksum of these words."""
    h = 8 * len(words)
    for word in words:
        h = (word - (h << 5 & WORD | h >> 59)) * GOLDEN & WORD
    return h


def uuid_of(title):
    """The UUID in one of the documented files."""
    text = (HERE / title).read_text()
    return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)[0]


FIRST = uuid_of("nodedev.xml")
SECOND = FIRST[:-2] + "02"
SMALL = FIRST[:-2] + "03"


def variant(title, name, changes):
    """A documented file with other words in it."""
    text = (HERE / title).read_text()
    for old, new in changes.items():
        check(old in text, f"{title} has no {old}")
        text = text.replace(old, new)
    path = WORK / name
    path.write_text(text)
    return path


def domain(title, host):
    """A documented domain with a qtest socket of this host."""
    tree = ET.parse(HERE / title)
    line = tree.getroot().find(f"{{{QEMU_NS}}}commandline")
    if line is None:
        line = ET.SubElement(tree.getroot(), f"{{{QEMU_NS}}}commandline")
    socket_option = f"unix:{WORK}/{host.name}.qtest,server=on,wait=off"
    for value in ("-qtest", socket_option, "-qtest-log", "none"):
        ET.SubElement(line, f"{{{QEMU_NS}}}arg", value=value)
    path = WORK / "domain.xml"
    tree.write(path)
    return path


def device_of(host):
    """The device in the guest that runs on this host, once it has its BARs."""
    qtest = Qtest(WORK / f"{host.name}.qtest")
    deadline = time.monotonic() + 120
    while True:
        try:
            return Mock(qtest)
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def needs_inotify():
    """Skips a test of node devices if the kernel cannot have them."""
    if not has_inotify:
        raise Skipped("the kernel has no inotify")


class Tests:
    """The tests, one after the other, each a step further."""

    def __init__(self):
        self.here = Host("here")
        self.there = Host("there")
        self.name = None

    def documented_files_are_valid(self):
        """the documented XML is what the schemas of libvirt allow"""
        run("virt-xml-validate", HERE / "nodedev.xml", "nodedev")
        for title in ("domain.xml", "iommufd.xml"):
            run("virt-xml-validate", HERE / title, "domain")
        wrong = variant("domain.xml", "wrong.xml", {"'vfio-pci'": "'vfio-isa'"})
        run("virt-xml-validate", wrong, "domain", ok=False)

    def devices_are_made(self):
        """mdevctl defines one device, and starts all"""
        kind = ("-p", "vfio_mock", "-t")
        run("mdevctl", "define", "-u", FIRST, *kind, "vfio_mock-1M")
        run("mdevctl", "start", "-u", FIRST)
        run("mdevctl", "start", "-u", SECOND, *kind, "vfio_mock-1M")
        run("mdevctl", "start", "-u", SMALL, *kind, "vfio_mock-64K")
        for host in (self.here, self.there):
            host.wait()

    def devices_are_seen(self):
        """both daemons see the devices, as documented"""
        needs_inotify()
        for host in (self.here, self.there):
            for device in (FIRST, SECOND, SMALL):
                host.appears(device, "mdev")
        self.name = self.here.appears(FIRST, "mdev")
        path = WORK / "dump.xml"
        path.write_text(self.here.virsh("nodedev-dumpxml", self.name))
        run("virt-xml-validate", path, "nodedev")
        told, seen = (
            {(e.tag, e.text, e.get("id")) for e in ET.parse(each).iter() if not len(e)}
            for each in (HERE / "nodedev.xml", path)
        )
        check(told <= seen, f"documented, but not seen: {told - seen}")

    def definition_is_refused(self):
        """libvirt does not know the parent, and defines no device of it"""
        needs_inotify()
        parent = {"<parent>computer": "<parent>vfio_mock"}
        path = variant("nodedev.xml", "define.xml", parent)
        said = self.here.virsh("nodedev-define", path, ok=False)
        check("invalid parent device" in said, said)

    def domain_starts(self):
        """a domain with the device starts and works with it"""
        self.here.virsh("create", domain("domain.xml", self.here))
        check(self.here.domains() == ["guest"], "it does not run")
        mock = device_of(self.here)
        mock.execute(1, SEED)
        mock.qtest.command("writeb", mock.memory + mock.size - 1, 0)
        try:
            mock.holds_pattern(SEED)
        except Failed:
            pass
        else:
            raise Failed("one other byte goes unnoticed")
        mock.execute(1, SEED)
        mock.set(0x18, SEED + 1)
        mock.holds_pattern(SEED)

    def migrate(self, source, target, device, *options, ok=True):
        """Migrates the domain to another device, and looks at both sides."""
        text = source.virsh("dumpxml", "--migratable", "guest")
        text = re.sub("(<address uuid=)'[^']*'", rf"\1'{device}'", text)
        path = WORK / "target.xml"
        path.write_text(text.replace(f"{source.name}.qtest", f"{target.name}.qtest"))
        said = source.virsh(
            *("migrate", "--live", "guest", target.uri, "--xml", path, *options),
            *("--migrateuri", "tcp://127.0.0.1"),
            ok=ok,
        )
        to, other = (target, source) if ok else (source, target)
        check(to.domains() == ["guest"], f"{to.name} runs {to.domains()}: {said}")
        check(not other.domains(), f"{other.name} runs {other.domains()}: {said}")
        check(to.virsh("domstate", "guest") == "running", "it is not running")
        mock = device_of(to)
        check(mock.get(0x18) == SEED + 1, "another SCRATCH")
        mock.holds_pattern(SEED)
        return said

    def domain_migrates(self):
        """virsh migrates the domain live, and the device has what it had"""
        self.migrate(self.here, self.there, SECOND)

    def smaller_device_is_refused(self):
        """a device of another size refuses the migration, and the guest goes on"""
        self.migrate(self.there, self.here, SMALL, ok=False)

    def domain_migrates_back(self):
        """the daemons migrate the domain back among themselves"""
        self.migrate(self.there, self.here, FIRST, "--p2p")

    def iommufd_migrates(self):
        """a domain that uses an iommufd migrates"""
        self.here.virsh("destroy", "guest")
        self.here.virsh("create", domain("iommufd.xml", self.here))
        mock = device_of(self.here)
        mock.execute(1, SEED)
        mock.set(0x18, SEED + 1)
        self.migrate(self.here, self.there, SECOND)

    def definition_is_used(self):
        """a device is destroyed, started again, and undefined"""
        needs_inotify()
        self.here.virsh("nodedev-destroy", self.name)
        check(not (DEVICES / FIRST).exists(), "it still exists")
        self.here.virsh("nodedev-start", self.name)
        check((DEVICES / FIRST).exists(), "it does not exist")
        self.here.virsh("nodedev-undefine", self.name)
        check(not run("mdevctl", "list", "-d"), "it is still defined")

    def domain_ends(self):
        """the domain ends, and its device can go"""
        self.there.virsh("destroy", "guest")
        check(not self.there.domains(), "it still runs")
        for device in (FIRST, SECOND, SMALL):
            run("mdevctl", "stop", "-u", device)
            check(not (DEVICES / device).exists(), "the device still exists")

    def all(self):
        """The tests in their order."""
        return [
            self.documented_files_are_valid,
            self.devices_are_made,
            self.devices_are_seen,
            self.definition_is_refused,
            self.domain_starts,
            self.domain_migrates,
            self.smaller_device_is_refused,
            self.domain_migrates_back,
            self.iommufd_migrates,
            self.definition_is_used,
            self.domain_ends,
        ]


def prepare(root):
    """Puts libvirt where it belongs and starts what it needs."""
    WORK.mkdir()
    overlay = Path("/run/libvirt-usr")
    for part in ("upper", "work"):
        (overlay / part).mkdir(parents=True)
    options = (
        f"lowerdir={root}/usr:/usr,upperdir={overlay}/upper,workdir={overlay}/work"
    )
    run("mount", "-t", "overlay", "overlay", "-o", options, "/usr")
    # What is defined on the host is none of this machine's business.
    definitions = Path("/run/mdevctl.d")
    definitions.mkdir()
    scripts = Path("/etc/mdevctl.d/scripts.d")
    if scripts.exists():
        run("cp", "-a", scripts, definitions)
    run("mount", "--bind", definitions, "/etc/mdevctl.d")
    # Without these libvirtd does not start, whoever QEMU runs as.
    for path, line in (
        ("/etc/passwd", "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin"),
        ("/etc/group", "libvirt-qemu:x:64055:"),
    ):
        with open(path, "a") as file:
            print(line, file=file)
    QEMU_DRIVER.mkdir()
    (QEMU_DRIVER / "libvirt_driver_qemu.so").symlink_to(
        DRIVERS / "libvirt_driver_qemu.so"
    )
    if has_inotify:
        # libvirt learns of devices from udev.
        run("/lib/systemd/systemd-udevd", "--daemon")
        run("udevadm", "trigger", "--action=add")
        run("udevadm", "settle")


def adopt_orphans():
    """Goes on in a child, and waits for whatever loses its parent: libvirt kills a
    QEMU and waits until it is gone, and the machine's init would let it stay."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    child = os.fork()
    while child:
        pid, status = os.wait()
        if pid == child:
            sys.exit(os.waitstatus_to_exitcode(status))


def main():
    """Runs the tests; what comes after a failure is not tried."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    os.environ["LC_ALL"] = "C"
    adopt_orphans()
    prepare(sys.argv[1])
    tests = Tests()
    failed = None
    print(f"TAP version 13\n1..{len(tests.all())}", flush=True)
    for number, test in enumerate(tests.all(), 1):
        result, note = "ok", ""
        try:
            check(failed is None, f"not tried, because of test {failed}")
            test()
        except Skipped as error:
            note = f" # SKIP {error}"
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            result = "not ok"
            for line in str(error).split("\n"):
                print(f"# {line}")
            for host in (tests.here, tests.there) if failed is None else ():
                for line in host.log.read_text().split("\n")[-20:]:
                    print(f"# {host.name}: {line}")
            failed = failed or number
        print(f"{result} {number} - {test.__doc__}{note}", flush=True)
    for host in (tests.here, tests.there):
        host.process.kill()
    return failed is not None


if __name__ == "__main__":
    sys.exit(main())
