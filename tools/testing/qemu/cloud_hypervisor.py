# SPDX-License-Identifier: GPL-2.0
"""A Cloud Hypervisor with its VFIO device, and the scenario that migrates its guest."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections import namedtuple

from cases import REFUSED, UNSTOPPED, Knobs, chosen, faults, finish, notices
from machine import KERNEL_OPTIONS, Failure, Vmm, expect, wait

MIGRATE_TIMEOUT = 240
COMMAND_TIMEOUT = 120

# The reports of the source about its migration.
FAILED = re.compile(r"-- Migration failed: (.*)")
COMPLETED = re.compile(r"Migration completed after (\S+) with a downtime of (\d+)ms")

# What else a migration with a fault leads to.
RESET = "the device of the source is reset, and the guest goes on with that"
HANGS = "the guest of the source hangs until it is paused and resumed"
ENDS = "the source ends, and its guest is lost"

# A migration that fails: its outcome, and the knobs of both devices.
Case = namedtuple("Case", "outcome source target", defaults=({}, {}))

CASES = {
    "log-start": Case(UNSTOPPED, faults("log_start errno=ENOMEM")),
    "read": Case(REFUSED, faults("read after=65536")),
    "version": Case(REFUSED, {"stream_version": 2}),
    "target-run": Case(REFUSED, target=faults("arc RUNNING_P2P->RUNNING")),
    "end": Case(RESET, faults("arc STOP_COPY->STOP")),
    "stop": Case(HANGS, faults("arc RUNNING_P2P->STOP")),
    "back": Case(ENDS, faults("read; arc RUNNING_P2P->RUNNING")),
}

# Seconds without a report of a guest that hangs.
HANG_TIME = 10

# Messages that are more than warnings about the host.
TROUBLE = re.compile(r"> ERROR:")

# The name of the device, which is the same on both sides.
DEVICE = "device0"


class CloudHypervisor(Vmm):
    """A Cloud Hypervisor process, from start to close()."""

    program = "Cloud Hypervisor"
    files = ("stderr",)

    def __init__(self, name, options, devices=(), _backend=None, guest=None):
        """The guest boots, or this is a target that waits for a command."""
        super().__init__(name, options, devices, guest)
        self.programs = options.cloud_hypervisor
        argv = [self.programs / "cloud-hypervisor", "--api-socket", "path=api"]
        # The test kernel has no seccomp. The report is at the level info.
        argv += ["--seccomp", "false", "-v"]
        if guest:
            argv += ["--memory", f"size={options.memory}M", "--console", "off"]
            argv += ["--kernel", options.kernel, "--initramfs", options.initramfs]
            # There is one serial port. A migration takes its path along: relative to
            # the folder, each process has its own.
            append = f"{KERNEL_OPTIONS} report=/dev/ttyS0 {options.append}"
            argv += ["--cmdline", append, "--serial", "socket=serial"]
            argv += ["--platform", "iommufd=on"]
            argv += ["--device", f"id={DEVICE},path={self.mdevs[0].path}"]
        self.launch(argv, cwd=self.folder)

    def start(self, timeout):
        """Waits until the process takes commands."""
        wait([self], (self.folder / "api").exists, timeout, "the API socket")

    def run(self):
        """The guest of a process with arguments boots at once."""

    def _remote(self, command, *arguments):
        argv = [self.programs / "ch-remote", "--api-socket", self.folder / "api"]
        return [*argv, command, *arguments]

    def command(self, *command):
        """Runs a command of ch-remote."""
        done = subprocess.run(
            self._remote(*command),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        if done.returncode:
            raise Failure(f"{self.name}: {command[0]}: {done.stderr.strip()}")

    def resume(self):
        """Continues a guest that is stopped."""
        self.command("resume")

    def take(self, command, parameters):
        """Starts a command of ch-remote that gets a guest, with files for its device."""
        files = (self.mdevs[0].cdev(), "/dev/iommu")
        fds = [os.open(path, os.O_RDWR) for path in files]
        parameters += f",vfio_fds=[{DEVICE}@{fds[0]}],iommufd_fd={fds[1]}"
        argv = self._remote(command, parameters)
        taker = subprocess.Popen(argv, pass_fds=fds, stderr=subprocess.PIPE, text=True)
        for fd in fds:
            os.close(fd)
        return taker

    def taken(self, taker):
        """Returns whether that command has ended."""
        if taker.poll():
            raise Failure(f"{self.name}: {taker.stderr.read().strip()}")
        return taker.returncode == 0

    def receive(self):
        """Processes output of the guest."""
        if self.guest and not self.report:
            # The port exists when the guest does, and keeps its output until then.
            port = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                port.connect(str(self.folder / "serial"))
                port.setblocking(False)
                self.report = port
        super().receive()

    def shutdown(self):
        """Returns the reason for the guest's shutdown, or None."""
        return "guest-shutdown" if self.process.poll() == 0 else None

    def complaints(self):
        """Returns the unexpected messages."""
        return [line for line in super().complaints() if TROUBLE.search(line)]

    def close(self):
        """Ends the process, and waits for its exit."""
        if self.closed:
            return
        self.closed = True
        self.process.terminate()
        self.end()


def begin(source, target):
    """Starts a migration; returns the command that ends with it."""
    stream = target.folder / "stream"
    taker = target.take("receive-migration", f"receiver_url=unix:{stream}")
    wait([target], stream.exists, COMMAND_TIMEOUT, "the target waits")
    source.command("send-migration", f"destination_url=unix:{stream}")
    return taker


def migrate(scenario, source, target):
    """Migrates the guest while it works; returns a line about it."""
    taker = begin(source, target)

    def done():
        source.receive()
        return target.taken(taker) and source.gone()

    wait([target], done, MIGRATE_TIMEOUT, "migration")
    source.receive()
    target.guest, source.guest = scenario.guest, None
    scenario.work_on(target)
    took, downtime = COMPLETED.search("\n".join(source.read("stderr"))).groups()
    for mdev in scenario.source_mdevs:
        times = [
            f"{name.removesuffix('_us')} {number // 1000} ms"
            for name, number in mdev.statistics().items()
            if name.endswith("_us") and number
        ]
        scenario.view.say(f"states of the source's device: {', '.join(times)}")
    scenario.drop(source)
    return f"migrated in {took}, downtime {downtime} ms"


def snapshot(scenario, source):
    """Saves the guest, and restores it in another process, which is returned."""
    folder = scenario.options.folder / "snapshot"
    folder.mkdir()
    source.command("pause")
    guest = scenario.leave(source)
    held = scenario.hold(source)
    source.command("snapshot", f"file://{folder}")
    scenario.drop(source)
    target = scenario.target("restored")
    taker = target.take("restore", f"source_url=file://{folder}")
    wait([target], lambda: target.taken(taker), COMMAND_TIMEOUT, "the guest is restored")
    scenario.expect_held(target, held)
    scenario.view.say("the device is that of the snapshot")
    scenario.enter(target, guest)
    scenario.work_on(target)
    return target


def play(scenario):
    """The guest migrates while it works, is saved, and continues from the snapshot."""
    source = scenario.boot()
    target = scenario.target()
    migrated = migrate(scenario, source, target)
    scenario.verify(target)
    # The device of the source is free.
    scenario.target_mdevs = scenario.source_mdevs
    restored = snapshot(scenario, target)
    scenario.verify(restored)
    scenario.quit(restored)
    return f"{migrated}, restored from a snapshot, guest's checks ok"


def play_cases(scenario):
    """Migrations that fail, with one guest, which is not checked after a reset."""
    source = scenario.boot()
    table = chosen(scenario, CASES)
    for name, case in table.items():
        play_case(scenario, source, name, case)
    if source in scenario.machines:
        finish(scenario, source)
    return f"{len(table)} migrations with faults"


def play_case(scenario, source, name, case):
    """One migration that fails."""
    target = scenario.target(name)
    (one,), (other,) = source.mdevs, target.mdevs
    knobs = Knobs()
    knobs.turn(one, case.source)
    knobs.turn(other, case.target)
    before = one.statistics()
    begin(source, target)

    def failed():
        source.receive()
        if source.gone() and case.outcome is not ENDS:
            raise Failure(source.fate())
        return FAILED.search("\n".join(source.complaints()))

    why = wait([], failed, MIGRATE_TIMEOUT, "the migration fails")[1].strip()
    target.close()
    scenario.machines.remove(target)
    scenario.judge(target)
    if case.outcome is ENDS:
        wait([], source.gone, MIGRATE_TIMEOUT, "the source ends")
        scenario.drop(source)
    else:
        survive(scenario, source, case, before)
        source.excuse()
    knobs.restore()
    scenario.view.say(f"{name}: {why}: {case.outcome}")


def survive(scenario, source, case, before):
    """Checks guest and device of the source after a migration that failed."""
    (one,) = source.mdevs
    if case.outcome is HANGS:
        source.receive()
        work = scenario.guest.count("gen")
        time.sleep(HANG_TIME)
        source.receive()
        expect("the work of a guest that hangs", scenario.guest.count("gen"), work)
        source.command("pause")
        source.resume()
    wait([], lambda: one.state() == "RUNNING", MIGRATE_TIMEOUT, "the device continues")
    if before:
        after = one.statistics()
        reset = case.outcome in (RESET, HANGS)
        resets = after["resets"] - before["resets"]
        expect("resets of the source's device", resets, int(reset))
        stopped = after["STOP_us"] > before["STOP_us"]
        expect("the device was stopped", stopped, case.outcome is not UNSTOPPED)
    if case.outcome in (RESET, HANGS):
        notices(source)
    else:
        scenario.work_on(source)
