# SPDX-License-Identifier: GPL-2.0
"""A process of QEMU or of another VMM, with its VFIO devices and its guest."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from qmp import Qmp, QmpError
from view import size

# The built-in tests of the kernel need not run in every guest. The guest maps BARs of
# devices that vfio-pci has claimed, which CONFIG_IO_STRICT_DEVMEM forbids by default.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 kunit.enable=0 iomem=relaxed"
)

# Root ports of each machine, one for each device.
PORTS = 2

# Time limits in seconds, for the exit of a QEMU that has closed its monitor, and for
# a guest without devices in a file.
END_TIMEOUT = 5
FILE_TIMEOUT = 60

PAIR = re.compile(r'(\w+)=("[^"]*"|\S+)')

# Events in QEMU's trace about the DMA log of devices, and that of the IOMMU. The name of
# the last event depends on the version.
LOG_START = re.compile(r"vfio_device_dirty_tracking_start ")
IOMMU_LOG_START = re.compile(r"iommufd_backend_set_dirty .* enable=1 \(0\)")
LOG_PAGES = re.compile(r"vfio_\w+_dirty_bitmap .* dirty_pages=(\d+)")
TRACES = (
    "vfio_migration*",
    "vfio_save*",
    "vfio_load*",
    "vfio_state*",
    "vfio_device_dirty_tracking_start",
    "iommufd_backend_set_dirty",
    "vfio_*_dirty_bitmap",
)


class Failure(Exception):
    """A check failed; the scenario ends here."""


def expect(what, got, want):
    """Fails unless a value is the wanted one."""
    if got != want:
        raise Failure(f"{what}: {got}, not {want}")


class Guest:
    """Reports of guest.c. The object follows its guest to the target."""

    def __init__(self):
        self.buffer = b""
        self.lines = []
        self.progress = {}
        self.ready = None
        self.verdicts = []
        self.troubles = []

    def feed(self, data):
        """Processes bytes of the serial port, in pieces of any size."""
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace"))

    def _line(self, line):
        self.lines.append(line)
        word, _, rest = line.partition(" ")
        pairs = {k: v.strip('"') for k, v in PAIR.findall(rest)}
        if word == "@work":
            self.progress = pairs
        elif word == "@ready":
            self.ready = pairs
        elif word == "@verdict":
            self.progress = pairs
            self.verdicts.append(pairs)
        elif word in ("@fatal", "@mismatch", "@unknown"):
            self.troubles.append(line)

    def count(self, name):
        """One counter of the last report."""
        return int(self.progress.get(name, 0))

    def reaches(self, **counters):
        """Returns whether each counter has reached the given value."""
        return all(self.count(k) >= v for k, v in counters.items())

    def work_done(self):
        """Returns a readable summary of the guest's work so far."""
        written = size(self.count("written") + self.count("filled"))
        return (
            f"generation {self.count('gen')}, {written} written, "
            f"{self.count('doorbells')} doorbells, "
            f"{self.count('irqs') + self.count('dma_irqs')} interrupts, "
            f"{self._dma_done()}{self.count('mismatches')} mismatches"
        )

    def _dma_done(self):
        if not self.count("transfers"):
            return ""
        moved = size(self.count("moved"))
        return f"{self.count('transfers')} DMA transfers, {moved} moved, "


class Vmm:
    """A process of a VMM, with its VFIO devices and its guest."""

    # The name of the VMM, and the files with its output.
    program = ""
    files = ()

    def __init__(self, name, options, devices, guest):
        """`devices` has each device and its properties."""
        self.name = name
        self.guest = guest
        self.mdevs = [mdev for mdev, _ in devices]
        self.folder = options.folder / name
        self.folder.mkdir()
        self.closed = False
        self.excused = 0
        # The other end of the serial port that the guest reports to.
        self.report = None

    def launch(self, argv, **more):
        """Starts the process."""
        with open(self.folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, **more
            )
        for mdev in self.mdevs:
            mdev.holder = self.process.pid

    @property
    def pid(self):
        """The process id."""
        return self.process.pid

    def poll(self):
        """Processes output of the guest, and detects when the process has exited."""
        self.receive()
        if self.process.poll() is not None:
            raise Failure(self.fate())

    def receive(self):
        """Processes output of the guest."""
        while self.report:
            try:
                data = self.report.recv(65536)
            except (BlockingIOError, ConnectionError):
                break
            if not data:
                break
            if self.guest:
                self.guest.feed(data)

    def send(self, command):
        """Gives the guest a command."""
        self.report.sendall(command.encode() + b"\n")

    def gone(self):
        """Returns whether the process has ended, or is about to."""
        return self.process.poll() is not None

    def fate(self, timeout=0):
        """Returns a description of the status of the process."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"{self.name} {self.program} runs"
        if status < 0:
            name = signal.Signals(-status).name
            return f"{self.name} {self.program} was killed by {name}"
        return f"{self.name} {self.program} ended with status {status}"

    def end(self):
        """Waits for the exit of a process that was asked to end, and kills it if needed."""
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.report:
            self.report.close()

    def read(self, title):
        """The lines of one of the files that the VMM writes."""
        with contextlib.suppress(OSError):
            path = self.folder / title
            return path.read_text(errors="replace").splitlines()
        return []

    def excuse(self):
        """Marks the messages so far as expected."""
        self.excused = len(self.read("stderr"))

    def complaints(self):
        """Returns the unexpected messages."""
        return self.read("stderr")[self.excused :]

    def diagnostics(self):
        """Returns the last lines of output of the VMM and of its guest."""
        self.receive()
        yield self.fate()
        for title in self.files:
            for line in ends(self.read(title)):
                yield f"{self.name} {title}: {line}"
        for line in self.guest.lines[-20:] if self.guest else ():
            yield f"{self.name} guest: {line}"


class Machine(Vmm):
    """A QEMU process, from start to close()."""

    program = "QEMU"
    files = ("stderr", "console", "trace")

    def __init__(self, name, options, devices=(), backend=None, guest=None):
        """The guest boots, or is restored from a file, or migrates to this machine."""
        super().__init__(name, options, devices, guest)
        # The states that the devices reach: (number, state).
        self.states = []
        # Called while the guest is stopped, before QEMU goes on.
        self.before_switchover = None
        report, far_report = socket.socketpair()
        monitor, far_monitor = socket.socketpair()
        self.report = report
        self.report.setblocking(False)
        self.qmp = Qmp(monitor)
        devices = [
            vfio_device(number, *each, backend)
            for number, each in enumerate(devices)
        ]
        # A restored guest gets its devices later.
        self.restore = options.restore if guest else None
        self.pending = devices if self.restore else []
        argv = self._argv(options, backend, far_report, far_monitor)
        if self.restore or not guest:
            argv += ["-incoming", "defer"]
        if not self.restore:
            for each in devices:
                argv += ["-device", json.dumps(each)]
        self.launch(argv, pass_fds=(far_report.fileno(), far_monitor.fileno()))
        far_report.close()
        far_monitor.close()

    def _argv(self, options, backend, report, monitor):
        argv = [options.qemu, "-nodefaults", "-display", "none"]
        # Keep QEMU running after a shutdown or reset of the guest, for queries.
        argv += ["-action", "reboot=shutdown,shutdown=pause"]
        argv += ["-machine", "q35", "-m", options.memory, "-S"]
        argv += ["-accel", options.accel]
        # The basic CPU model works where the host model, nested, does not.
        argv += ["-cpu", "qemu64"]
        argv += ["-kernel", options.kernel, "-initrd", options.initramfs]
        append = f"{KERNEL_OPTIONS} {options.append}"
        if options.save or options.restore:
            append += " hotplug=1"
        argv += ["-append", append]
        argv += ["-serial", f"file:{self.folder / 'console'}"]
        argv += ["-chardev", f"socket,id=report,fd={report.fileno()}"]
        argv += ["-serial", "chardev:report"]
        argv += ["-chardev", f"socket,id=monitor,fd={monitor.fileno()}"]
        argv += ["-mon", "chardev=monitor,mode=control"]
        if backend == "iommufd":
            argv += ["-object", "iommufd,id=iommufd0"]
        # The firmware reserves room for devices that are plugged in later.
        for number in range(PORTS):
            port = f"pcie-root-port,id=port{number},slot={number}"
            argv += ["-device", f"{port},mem-reserve=64M,pref64-reserve=64M"]
        for trace in TRACES:
            argv += ["-trace", trace]
        argv += ["-D", str(self.folder / "trace")]
        return argv

    def start(self, timeout):
        """Waits until QEMU has created the machine, and restores the guest."""
        try:
            self.qmp.handshake(timeout)
        except QmpError as error:
            raise Failure(f"{self.name} QEMU does not start: {error}") from None
        if self.restore:
            uri = {"uri": f"file:{self.restore}"}
            self.qmp.command("migrate-incoming", uri)
            wait([self], self.migrated, FILE_TIMEOUT, "the guest is restored")

    def run(self):
        """Plugs in devices that the machine does not have yet, and starts the guest."""
        for each in self.pending:
            self.qmp.command("device_add", each)
        self.qmp.command("cont")
        if self.pending:
            self.send("plugged")

    def resume(self):
        """Continues a guest that is stopped."""
        self.qmp.command("cont")

    def save(self, path):
        """Stops the guest and saves it in a file."""
        self.qmp.command("stop")
        self.qmp.command("migrate", {"uri": f"file:{path}"})
        wait([self], self.migrated, FILE_TIMEOUT, "the guest is saved")

    def job(self, command, arguments):
        """Runs a command of QEMU that is a job, and waits for its end."""
        self.qmp.command(command, arguments | {"job-id": "job"})

        def concluded():
            jobs = self.qmp.command("query-jobs")
            return [job for job in jobs if job["status"] == "concluded"]

        (job,) = wait([self], concluded, FILE_TIMEOUT, command)
        self.qmp.command("job-dismiss", {"id": "job"})
        if "error" in job:
            raise Failure(f"{command}: {job['error']}")

    def add_disk(self):
        """Adds a disk that the guest does not see, for snapshots."""
        path = str(self.folder / "disk")
        for driver, disk in (
            ("file", {"filename": path}),
            ("qcow2", {"file": "file"}),
        ):
            options = {"driver": driver, "size": 1 << 20} | disk
            self.job("blockdev-create", {"options": options})
            self.qmp.command(
                "blockdev-add", {"driver": driver, "node-name": driver} | disk
            )

    def snapshot(self, action):
        """Saves a snapshot on that disk, or loads it: `action` is save or load."""
        disk = {"devices": ["qcow2"], "vmstate": "qcow2"}
        self.job(f"snapshot-{action}", disk | {"tag": "snapshot"})

    def migrated(self):
        """Returns whether a migration has completed."""
        info = self.qmp.command("query-migrate")
        if info.get("status") == "failed":
            raise Failure(f"{self.name} QEMU fails: {info.get('error-desc')}")
        return info.get("status") == "completed"

    def allow(self, *capabilities, among=()):
        """Turns capabilities of migration on, and others of `among` off."""
        states = [
            {"capability": name, "state": name in capabilities}
            for name in {*capabilities, *among}
        ]
        self.qmp.command("migrate-set-capabilities", {"capabilities": states})

    def pause_at_switchover(self):
        """Lets QEMU process events between the stop of the guest and the switchover.

        An emulated guest gets an interrupt of a VFIO device when the main loop of QEMU
        has read an eventfd. Without a pause, this loop does not run again before QEMU
        saves the interrupt controller, and the last interrupts are lost. libvirt always
        asks for the pause.
        """
        self.allow("events", "pause-before-switchover")

    def poll(self):
        """Processes output of guest and QEMU, and detects when QEMU has exited."""
        self.qmp.poll()
        for event in self.qmp.take_events("VFIO_MIGRATION"):
            number = int(event["device-id"].removeprefix("device"))
            state = event["device-state"].upper().replace("-", "_")
            self.states.append((number, state))
        for event in self.qmp.take_events("MIGRATION"):
            if event["status"] == "pre-switchover":
                if self.before_switchover:
                    self.before_switchover()
                self.qmp.command("migrate-continue", {"state": "pre-switchover"})
        if self.qmp.take_events("STOP"):
            status = self.qmp.command("query-status")["status"]
            if status in ("internal-error", "guest-panicked", "io-error"):
                raise Failure(f"{self.name} QEMU stops: {status}")
        reason = self.shutdown()
        if reason:
            raise Failure(f"the {self.name} guest ended by itself: {reason}")
        super().poll()

    def shutdown(self):
        """Returns the reason for the guest's shutdown, or None."""
        self.qmp.poll()
        for event in self.qmp.take_events("SHUTDOWN"):
            return event["reason"]
        return None

    def gone(self):
        """Returns whether QEMU has ended, or has closed its monitor to do so."""
        return self.qmp.closed or super().gone()

    def fate(self, timeout=0):
        """Returns a description of QEMU's status."""
        return super().fate(END_TIMEOUT if self.qmp.closed else timeout)

    def memory(self, name):
        """Returns a number of the kernel about QEMU's memory, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(f"^{name}:\\s+(\\d+) kB$", status, re.MULTILINE)[1]) << 10

    def forget_peak(self):
        """Lets the peak of the memory (VmHWM) begin at what QEMU has now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def dma_log(self):
        """Returns the owners of the DMA logs that QEMU started, and the pages found."""
        trace = "\n".join(self.read("trace"))
        starts = {"device": LOG_START, "IOMMU": IOMMU_LOG_START}
        owners = [owner for owner, start in starts.items() if start.search(trace)]
        return owners, sum(int(count) for count in LOG_PAGES.findall(trace))

    def close(self):
        """Ends QEMU, first with a request, and waits for its exit."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(QmpError, OSError):
            if self.process.poll() is None:
                self.qmp.command("quit", timeout=5)
        self.end()
        self.qmp.sock.close()

    def diagnostics(self):
        """Returns the last lines of output of QEMU and of its guest."""
        self.qmp.poll()
        for event in self.qmp.events:
            what, data = event["event"], event.get("data", {})
            yield f"{self.name} event: {what} {data}"
        if not self.qmp.closed:
            # Show where a guest hangs. After a reset this information is lost.
            line = {"command-line": "info registers"}
            with contextlib.suppress(QmpError):
                for row in self.qmp.command(
                    "human-monitor-command", line
                ).splitlines():
                    if "IP=" in row or "SP=" in row:
                        yield f"{self.name} CPU: {row}"
        yield from super().diagnostics()


def vfio_device(number, mdev, properties, backend):
    """Returns the properties of a device for QEMU, below a port of its own."""
    vfio = {
        "driver": "vfio-pci",
        "id": f"device{number}",
        "bus": f"port{number}",
        "migration-events": True,
    } | mdev.qemu()
    if backend == "iommufd":
        vfio["iommufd"] = "iommufd0"
    return vfio | properties


def ends(lines, head=8, tail=20):
    """The first and the last lines of many."""
    if len(lines) <= head + tail:
        return lines
    return [*lines[:head], "...", *lines[-tail:]]


def wait(machines, condition, timeout, what, patient=False):
    """Polls the machines until `condition` is true, and returns its value.

    A guest that finds a mismatch ends the wait, unless told to be patient.
    """
    deadline = time.monotonic() + timeout
    while True:
        for machine in machines:
            machine.poll()
            for line in machine.guest.troubles if machine.guest else ():
                if not (patient and line.startswith("@mismatch")):
                    raise Failure(f"guest: {line}")
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {timeout} s")
        time.sleep(0.01)
