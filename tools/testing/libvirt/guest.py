#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Migrate a domain with a device between two libvirt daemons.

guest.py ROOT HOSTNAME MODULE

Runs in the test machine as root, with vfio_mock loaded. ROOT has the unpacked
packages of libvirt, HOSTNAME is the library built from hostname.c, MODULE is
vfio_mock.ko. Each daemon acts as a separate host, with its own folders in a mount
namespace, host name and UUID. Prints TAP.
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
PCI_DEVICES = Path("/sys/bus/pci/devices")
CONFIGFS = Path("/sys/kernel/config")
DEBUGFS = Path("/sys/kernel/debug/vfio")
# The drivers of libvirt, and a folder with the QEMU driver only.
DRIVERS = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver")
QEMU_DRIVER = WORK / "drivers"
# Address at which the firmware of q35 maps the PCI configuration space.
ECAM = 0xB0000000
SEED = 0x5EEDC0DE
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# Folders that each libvirt daemon has for itself.
FOLDERS = (
    "/etc/libvirt",
    "/run/libvirt",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
)
# The machine does not need cgroups, users or protection from the guest.
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

# The node device driver of libvirt does not start without it.
has_inotify = ctypes.CDLL(None).inotify_init() >= 0


class Skipped(Exception):
    """A test that this kernel does not support."""


class Failed(Exception):
    """Failure of a test."""


def check(condition, what):
    """Fails with `what` unless the condition holds."""
    if not condition:
        raise Failed(what)


def run(*command, ok=True):
    """Runs a command and returns its output, or a description of its failure."""
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
    """A libvirt daemon with its own folders, host name and UUID."""

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
        """Returns the path of a folder of the daemon outside of its namespace."""
        return self.folder / path.lstrip("/").replace("/", "-")

    @property
    def uri(self):
        """URI of the daemon."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    def wait(self):
        """Waits until the daemon accepts connections."""
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
        """Waits until udev reports a node device, and returns its name."""
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
        """Returns the names of the running and paused domains."""
        return self.virsh("list", "--name").split()


class Qtest:
    """Accesses to ports and memory on behalf of a guest."""

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
        """Runs a command and returns the words after its OK."""
        line = " ".join(w if isinstance(w, str) else hex(w) for w in words)
        print(line, file=self.file, flush=True)
        answer = self.file.readline().split()
        check(answer[:1] == ["OK"], f"qtest: {words[0]}: {answer}")
        return answer[1:]

    def config(self, bus, offset):
        """Reads a register of the configuration space of device 0 of a bus. It does not
        use the ports, because the firmware uses them at the same time."""
        return int(self.command("readl", ECAM + (bus << 20) + offset)[0], 16)

    def read(self, address, length):
        """Reads memory."""
        return base64.b64decode(self.command("b64read", address, length)[0])


class Mock:
    """The device in the guest, behind one of the root ports."""

    def __init__(self, qtest):
        self.qtest = qtest
        for bus in range(1, 16):
            if qtest.config(bus, 0) == 0x10F01AF4:
                break
        else:
            raise Failed("the guest has no vfio_mock")
        check(qtest.config(bus, 4) & 2, "the firmware has not enabled the device")
        bars = [qtest.config(bus, 0x10 + 4 * n) for n in range(4)]
        self.regs = (bars[1] << 32 | bars[0]) & ~0xF
        self.memory = (bars[3] << 32 | bars[2]) & ~0xF
        check(self.regs and self.memory, f"the firmware did not assign the BARs: {bars}")
        check(self.get(0, "l") == 0x4B4D4656, "not a vfio_mock")
        self.size = self.get(8)

    def get(self, offset, width="q"):
        """Reads a register."""
        return int(self.qtest.command(f"read{width}", self.regs + offset)[0], 16)

    def set(self, offset, value, width="q"):
        """Writes a register."""
        self.qtest.command(f"write{width}", self.regs + offset, value)

    def execute(self, command, seed=0):
        """Executes a command of the device on all of its memory."""
        self.set(0x20, 0)
        self.set(0x28, self.size)
        self.set(0x30, seed)
        self.set(0x38, command, "l")
        check(self.get(0x14, "l") & 6 == 2, "the device refuses the command")

    def holds_pattern(self, seed):
        """Checks every byte with the checksum of the device, and some with reads."""
        words = pattern(seed, self.size)
        self.execute(2)
        check(self.get(0x40) == checksum(words), "different checksum")
        start = self.size - 65536
        seen = self.qtest.read(self.memory + start, 65536)
        check(seen == struct.pack("<8192Q", *words[start // 8 :]), "different bytes")


def pattern(seed, size):
    """Returns the words of the pattern that the command FILL writes."""
    words = []
    for number in range(1, size // 8 + 1):
        z = seed + number * GOLDEN & WORD
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
        words.append(z ^ z >> 31)
    return words


def checksum(words):
    """Returns the checksum of these words."""
    h = 8 * len(words)
    for word in words:
        h = (word - (h << 5 & WORD | h >> 59)) * GOLDEN & WORD
    return h


def uuid_of(title):
    """Returns the UUID in one of the documented files."""
    text = (HERE / title).read_text()
    return re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)[0]


FIRST = uuid_of("nodedev.xml")
SECOND = FIRST[:-2] + "02"
SMALL = FIRST[:-2] + "03"
# The slots of functions are used in this order.
FUNCTIONS = ("1000:00:00.0", "1000:00:01.0")


def variant(title, name, changes):
    """Writes a documented file with replacements, and returns its path."""
    text = (HERE / title).read_text()
    for old, new in changes.items():
        check(old in text, f"{title} has no {old}")
        text = text.replace(old, new)
    path = WORK / name
    path.write_text(text)
    return path


def domain(title, host):
    """Writes a documented domain with a qtest socket, and returns its path."""
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


def address(device):
    """Returns the address of a mediated device or a PCI function in XML."""
    if device in FUNCTIONS:
        numbers = (f"0x{number}" for number in re.split("[:.]", device))
        words = zip(("domain", "bus", "slot", "function"), numbers)
    else:
        words = [("uuid", device)]
    return "<address " + " ".join(f"{key}='{value}'" for key, value in words) + "/>"


def driver_of(device):
    """Returns the name of the driver of a PCI function, if any."""
    link = PCI_DEVICES / device / "driver"
    return link.resolve().name if link.exists() else None


def judge(device, *broken):
    """Shows the verdict on the last QEMU with a device, which broke only these rules."""
    lines = (DEBUGFS / device / "verdict").read_text().splitlines()
    for line in lines:
        print(f"# verdict with {device}: {line}")
    told = [line.split(":")[0] for line in lines if not line.startswith("advice: ")]
    check(told == (list(broken) or ["clean"]), f"verdict: {told}")


def install(modules, module):
    """Installs modules of the kernel and another one, and their aliases."""
    folder = Path("/lib/modules") / os.uname().release
    upper = Path("/run/libvirt-modules")
    for part in (folder, upper / "upper", upper / "work"):
        part.mkdir(parents=True)
    options = f"lowerdir={modules},upperdir={upper}/upper,workdir={upper}/work"
    run("mount", "-t", "overlay", "overlay", "-o", options, folder)
    (folder / "updates").mkdir()
    run("cp", module, folder / "updates")
    run("depmod")


def device_of(host):
    """Returns the device in the guest on this host, once its BARs are assigned."""
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
    """Skips a test of node devices if the kernel has no inotify."""
    if not has_inotify:
        raise Skipped("the kernel has no inotify")


class Tests:
    """The tests, which depend on each other in their order."""

    def __init__(self):
        self.here = Host("here")
        self.there = Host("there")
        self.name = None

    def documented_files_are_valid(self):
        """documented XML matches the schemas of libvirt"""
        run("virt-xml-validate", HERE / "nodedev.xml", "nodedev")
        for title in ("domain.xml", "iommufd.xml", "function.xml"):
            run("virt-xml-validate", HERE / title, "domain")
        wrong = variant("domain.xml", "wrong.xml", {"'vfio-pci'": "'vfio-isa'"})
        run("virt-xml-validate", wrong, "domain", ok=False)

    def devices_are_made(self):
        """mdevctl defines one device and starts all"""
        kind = ("-p", "vfio_mock", "-t")
        run("mdevctl", "define", "-u", FIRST, *kind, "vfio_mock-1M")
        run("mdevctl", "start", "-u", FIRST)
        run("mdevctl", "start", "-u", SECOND, *kind, "vfio_mock-1M")
        run("mdevctl", "start", "-u", SMALL, *kind, "vfio_mock-64K")
        for host in (self.here, self.there):
            host.wait()

    def devices_are_seen(self):
        """both daemons list the devices as documented"""
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
        """libvirt refuses to define a device with this parent"""
        needs_inotify()
        parent = {"<parent>computer": "<parent>vfio_mock"}
        path = variant("nodedev.xml", "define.xml", parent)
        said = self.here.virsh("nodedev-define", path, ok=False)
        check("invalid parent device" in said, said)

    def domain_starts(self):
        """domain with the device starts and uses it"""
        self.here.virsh("create", domain("domain.xml", self.here))
        check(self.here.domains() == ["guest"], "the domain is not running")
        mock = device_of(self.here)
        mock.execute(1, SEED)
        mock.qtest.command("writeb", mock.memory + mock.size - 1, 0)
        try:
            mock.holds_pattern(SEED)
        except Failed:
            pass
        else:
            raise Failed("a different byte is not detected")
        mock.execute(1, SEED)
        mock.set(0x18, SEED + 1)
        mock.holds_pattern(SEED)

    def migrate(self, source, target, device, *options, ok=True):
        """Migrates the domain to another device, and checks both sides."""
        text = source.virsh("dumpxml", "--migratable", "guest")
        text = re.sub(r"(<source>\s*)<address [^>]*>", rf"\1{address(device)}", text)
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
        check(to.virsh("domstate", "guest") == "running", "the domain is not running")
        mock = device_of(to)
        check(mock.get(0x18) == SEED + 1, "different SCRATCH")
        mock.holds_pattern(SEED)
        return said

    def domain_migrates(self):
        """live migration with virsh keeps the content of the device"""
        self.migrate(self.here, self.there, SECOND)
        # QEMU stops the log when the guest continues, which it does not on the source.
        judge(FIRST, "log_not_stopped")

    def smaller_device_is_refused(self):
        """device of another size refuses the migration, and the guest continues"""
        self.migrate(self.there, self.here, SMALL, ok=False)
        judge(SMALL)

    def domain_migrates_back(self):
        """peer-to-peer migration returns the domain"""
        self.migrate(self.there, self.here, FIRST, "--p2p")
        judge(SECOND, "log_not_stopped")

    def iommufd_migrates(self):
        """domain with an iommufd migrates"""
        self.here.virsh("destroy", "guest")
        judge(FIRST)
        self.here.virsh("create", domain("iommufd.xml", self.here))
        mock = device_of(self.here)
        mock.execute(1, SEED)
        mock.set(0x18, SEED + 1)
        self.migrate(self.here, self.there, SECOND)
        judge(FIRST, "log_not_stopped")

    def definition_is_used(self):
        """device is destroyed, started again and undefined"""
        needs_inotify()
        self.here.virsh("nodedev-destroy", self.name)
        check(not (DEVICES / FIRST).exists(), "it still exists")
        self.here.virsh("nodedev-start", self.name)
        check((DEVICES / FIRST).exists(), "it does not exist")
        self.here.virsh("nodedev-undefine", self.name)
        check(not run("mdevctl", "list", "-d"), "it is still defined")

    def domain_ends(self):
        """domain ends, and the devices can be removed"""
        self.there.virsh("destroy", "guest")
        check(not self.there.domains(), "the domain still runs")
        judge(SECOND)
        for device in (FIRST, SECOND, SMALL):
            run("mdevctl", "stop", "-u", device)
            check(not (DEVICES / device).exists(), "the device still exists")

    def function_starts(self):
        """domain with a PCI function starts, and libvirt finds the driver by its alias"""
        if not os.path.ismount(CONFIGFS):
            run("mount", "-t", "configfs", "none", CONFIGFS)
        for number, device in enumerate(FUNCTIONS):
            folder = CONFIGFS / "vfio_mock" / str(number)
            folder.mkdir()
            for name, value in (("type", "1M"), ("bind", "0"), ("power", "1")):
                (folder / name).write_text(value)
            found = (folder / "address").read_text().strip()
            check(found == device, f"address {found}")
            check(driver_of(device) is None, "it is bound")
        self.here.virsh("create", domain("function.xml", self.here))
        check(driver_of(FUNCTIONS[0]) == "vfio_mock", f"driver {driver_of(FUNCTIONS[0])}")
        mock = device_of(self.here)
        mock.execute(1, SEED)
        mock.set(0x18, SEED + 1)
        mock.holds_pattern(SEED)

    def function_migrates(self):
        """live migration to another function and back, and libvirt releases the drivers"""
        for source, target, device, other in (
            (self.here, self.there, FUNCTIONS[1], FUNCTIONS[0]),
            (self.there, self.here, FUNCTIONS[0], FUNCTIONS[1]),
        ):
            self.migrate(source, target, device)
            check(driver_of(device) == "vfio_mock", f"driver {driver_of(device)}")
            check(driver_of(other) is None, f"{other} is still bound")

    def functions_end(self):
        """domain ends, and the functions can be removed"""
        self.here.virsh("destroy", "guest")
        check(driver_of(FUNCTIONS[0]) is None, "it is still bound")
        for number, device in enumerate(FUNCTIONS):
            (CONFIGFS / "vfio_mock" / str(number)).rmdir()
            check(not (PCI_DEVICES / device).exists(), "the function still exists")

    def all(self):
        """Returns the tests in their order."""
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
            self.function_starts,
            self.function_migrates,
            self.functions_end,
        ]


def prepare(root, module):
    """Mounts libvirt, installs the module, and starts its dependencies."""
    WORK.mkdir()
    # The next mount hides this folder.
    modules = (Path("/lib/modules") / os.uname().release).resolve()
    overlay = Path("/run/libvirt-usr")
    for part in ("upper", "work"):
        (overlay / part).mkdir(parents=True)
    options = (
        f"lowerdir={root}/usr:/usr,upperdir={overlay}/upper,workdir={overlay}/work"
    )
    run("mount", "-t", "overlay", "overlay", "-o", options, "/usr")
    install(modules, module)
    # Hide the devices that are defined on the host.
    definitions = Path("/run/mdevctl.d")
    definitions.mkdir()
    scripts = Path("/etc/mdevctl.d/scripts.d")
    if scripts.exists():
        run("cp", "-a", scripts, definitions)
    run("mount", "--bind", definitions, "/etc/mdevctl.d")
    # libvirtd needs these accounts to start, even if QEMU does not use them.
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
        # libvirt gets devices from udev.
        run("/lib/systemd/systemd-udevd", "--daemon")
        run("udevadm", "trigger", "--action=add")
        run("udevadm", "settle")


def adopt_orphans():
    """Continues in a child, and reaps all orphans in the parent. libvirt waits until a
    killed QEMU is gone, but the init of the machine does not reap it."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    child = os.fork()
    while child:
        pid, status = os.wait()
        if pid == child:
            sys.exit(os.waitstatus_to_exitcode(status))


def main():
    """Runs the tests up to the first failure."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    os.environ["LC_ALL"] = "C"
    adopt_orphans()
    prepare(sys.argv[1], sys.argv[3])
    tests = Tests()
    failed = None
    print(f"TAP version 13\n1..{len(tests.all())}", flush=True)
    for number, test in enumerate(tests.all(), 1):
        result, note = "ok", ""
        try:
            check(failed is None, f"not run because test {failed} failed")
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
