#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Live migration of a guest that works with a device, end to end.

Runs as root on a machine with the modules loaded, for example the test machine.
Two QEMU processes, or those of another VMM, have one or two devices each. The guest of
the first one keeps writing to its devices, migrates to the second one, and continues
there.
"""

import argparse
import copy
import hashlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import ExitStack
from itertools import groupby, pairwise
from pathlib import Path

sys.dont_write_bytecode = True

import cases
import cloud_hypervisor
import device
from cloud_hypervisor import CloudHypervisor
from machine import Failure, Guest, Machine, expect, wait
from outside import Outside, write_png
from qmp import QmpError
from view import View, size

BOOT_TIMEOUT = 240
WORK_TIMEOUT = 240
MIGRATE_TIMEOUT = 240
VERIFY_TIMEOUT = 240
QUIT_TIMEOUT = 120

# Number of endless transfers of each device of the guest.
ENDLESS = 3

# Minimum number of pauses of a guest, to see its devices in P2P states.
PAUSES = 10

# Number of transfers after which no earlier one is under way on any device.
TRANSFERS = 64

# Interval between polls of a migration in seconds. Polls take CPU time from the guest,
# but at most one part of this number.
LOOK_INTERVAL = 0.05
LOOK_SHARE = 4

HEADER = (
    f"{'time':>6} {'source':12} {'target':11} {'initial':>10} "
    f"{'dirty left':>10} {'sent':>10} {'round':>5} guest at"
)


class Scenario:
    """One guest, from its start on a source to its end on a target."""

    def __init__(self, options, plan, view):
        self.options = options
        self.plan = plan
        self.view = view
        self.stack = ExitStack()
        self.machines = []
        self.started = 0
        self.guest = Guest()
        self.source_mdevs = []
        self.target_mdevs = []

    def close(self):
        """Ends what the scenario started, and removes its devices."""
        self.stack.close()

    def _displays(self):
        kind = self.plan.kind
        displays = []
        for path in device.find_displays():
            displays.append([device.Display(kind.parent, path)])
            self.stack.callback(displays[-1][0].remove)
        expect("displays of the machine", len(displays), 2)
        return displays

    def _mdevs(self):
        kind = self.plan.kind
        mdev_type = self.options.type if kind is device.MOCK else kind.type
        mdevs = []
        for _ in range(self.plan.devices):
            if self.plan.function is None:
                mdev = device.Mdev(kind.parent, mdev_type)
            else:
                name = mdev_type.removeprefix(f"{kind.parent}-")
                mdev = device.Function(kind.parent, name, self.plan.function)
            self.stack.callback(mdev.remove)
            mdevs.append(mdev)
        return mdevs

    def _machine(self, name, mdevs, guest=None):
        backends = self.plan.backends
        backend = backends[self.started % len(backends)]
        self.started += 1
        devices = [(mdev, self.plan.properties) for mdev in mdevs]
        machine = self.plan.vmm(name, self.options, devices, backend, guest)
        self.stack.callback(machine.close)
        self.machines.append(machine)
        machine.start(BOOT_TIMEOUT)
        if self.plan.capabilities:
            machine.allow(*self.plan.capabilities)
        return machine

    def drop(self, machine, broken=()):
        """Ends a VMM that has done its part, and broke these rules of the verdict."""
        machine.close()
        self.machines.remove(machine)
        for line in machine.complaints():
            self.view.say(f"{machine.name} {machine.program} says: {line}")
        self.judge(machine, broken)

    def drop_source(self, source):
        """Ends a QEMU whose guest has migrated."""
        # QEMU stops the log when the guest continues, which it does not on the source.
        owners, _ = source.dma_log()
        self.drop(source, ["log_not_stopped"] if "device" in owners else [])

    def judge(self, machine, broken=()):
        """Shows the verdicts on a VMM that has ended, and checks them."""
        for mdev in machine.mdevs:
            lines = mdev.verdict()
            for line in lines:
                self.view.say(f"verdict on the {machine.name} {machine.program}: {line}")
            told = [line for line in lines if not line.startswith("advice: ")]
            if told:
                rules = [line.split(":")[0] for line in told]
                if self.plan.devices > 1 and "log_not_reported" in rules:
                    # QEMU asks for written pages of RAM, but not of other devices.
                    rules.remove("log_not_reported")
                expect("the verdict", rules, list(broken) or ["clean"])

    def boot(self):
        """Starts the source and waits until its guest works."""
        start = time.monotonic()
        if self.plan.kind is device.DISPLAY:
            self.source_mdevs, self.target_mdevs = self._displays()
        else:
            self.source_mdevs = self._mdevs()
            self.target_mdevs = self._mdevs()
        source = self._machine("source", self.source_mdevs, self.guest)
        source.run()
        wait(
            [source],
            lambda: self.guest.ready,
            BOOT_TIMEOUT,
            "the guest finds its devices",
        )
        self._work(source, generations=16, irqs=8)
        ready = self.guest.ready
        # The IOMMU of functions does not let devices access each other.
        p2p = self.plan.devices > 1 and self.plan.function is None
        expect("DMA between devices", ready["p2p"] == "1", p2p)
        self.view.say(
            f"guest up in {time.monotonic() - start:.0f} s with device "
            f"{ready['pci']}, state {size(int(ready['state_size']))}, "
            f"interrupts: {ready['irq']}"
        )
        self.view.say(f"guest works: {self.guest.work_done()}")
        return source

    def target(self, name="target"):
        """Starts a VMM that waits for the guest."""
        return self._machine(name, self.target_mdevs)

    def begin(self, source, target, bandwidth):
        """Starts the migration."""
        path = f"unix:{target.folder / 'stream'}"
        target.qmp.command("migrate-incoming", {"uri": path})
        source.qmp.command(
            "migrate-set-parameters", {"max-bandwidth": bandwidth << 20}
        )
        source.poll()
        source.states.clear()
        source.pause_at_switchover()
        source.qmp.command("migrate", {"uri": path})

    def watch(self, source, target, until):
        """Shows the migration until `until` returns true."""
        start = following = time.monotonic()
        self.view.say(HEADER)

        def look():
            nonlocal following
            now = time.monotonic()
            if now < following:
                return None
            sample = Sample(source, target)
            self.view.follow(
                (sample.state, sample.target_state),
                f"{now - start:4.1f} s {sample} {self.guest.count('gen'):8}",
            )
            took = time.monotonic() - now
            following = now + max(LOOK_INTERVAL, LOOK_SHARE * took)
            return sample if until(sample) else None

        sample = wait([source, target], look, MIGRATE_TIMEOUT, "migration")
        self.view.settle()
        return sample

    def half_way(self, source, target):
        """Starts a slow migration, and waits until half of the device is sent."""
        if "pre-copy" not in self.source_mdevs[0].features():
            raise Failure("without pre-copy there is no half-way")
        self.begin(source, target, self.options.slow_bandwidth)
        whole = 0

        def reached(sample):
            nonlocal whole
            if sample.status in ("completed", "failed"):
                raise Failure(f"the migration is {sample.status} before half-way")
            left = sum(sample.left) if sample.left else 0
            whole = max(whole, left)
            return sample.sent and 0 < left <= whole // 2

        self.watch(source, target, reached)

    def tell_bandwidth(self, source):
        """Tells QEMU the bandwidth, which it measures otherwise.

        A paused guest has no data to measure it with, except data that QEMU only
        sends after the switchover.
        """
        bandwidth = {"avail-switchover-bandwidth": self.options.bandwidth << 20}
        source.qmp.command("migrate-set-parameters", bandwidth)

    def complete(
        self,
        source,
        target,
        verify=False,
        paused=False,
        half_way=None,
        begun=None,
        at_switchover=None,
    ):
        """Migrates, compares, and continues the guest; returns the last sample.

        With `verify`, the guest first checks everything. With `paused`, it does
        not run during the migration. `half_way` is called in mid-migration, `begun`
        after the start, and `at_switchover` while the devices on both sides are
        stopped.
        """
        if paused:
            self.tell_bandwidth(source)
        if half_way:
            self.half_way(source, target)
            half_way()
            bandwidth = {"max-bandwidth": self.options.bandwidth << 20}
            source.qmp.command("migrate-set-parameters", bandwidth)
        else:
            self.begin(source, target, self.options.bandwidth)
        if begun:
            begun()
        sample = self.watch(
            source, target, lambda s: s.status in ("completed", "failed")
        )
        if sample.status != "completed":
            why = sample.info.get("error-desc", "no reason given")
            raise Failure(f"the migration fails: {why}")
        wait(
            [source, target],
            target.migrated,
            MIGRATE_TIMEOUT,
            "the target takes everything in",
        )
        for mdev in self.source_mdevs:
            expect("state of the source's device", mdev.state(), "STOP")
        digest = self.compare(source, target)
        self.view.say(f"devices at switchover: equal, sha256 {digest[:16]}")
        if at_switchover:
            at_switchover()

        target.guest, source.guest = self.guest, None
        known = len(self.guest.verdicts)
        if verify:
            target.send("verify")
        target.qmp.command("cont")
        if verify:
            self._verdict(target, known)
        self.work_on(target)
        features = self.target_mdevs[0].features()
        follow("source", source, source_states(features, paused), self.view)
        follow("target", target, target_states(features), self.view)
        if self.plan.devices > 1 or self.plan.function:
            self.expect_log(source, paused)
        self.drop_source(source)
        self.source_mdevs, self.target_mdevs = (
            self.target_mdevs,
            self.source_mdevs,
        )
        return sample

    def expect_log(self, source, paused):
        """Checks that QEMU got the pages written by DMA from the right log."""
        owners, pages = source.dma_log()
        has_log = self.plan.function is None or self.plan.function["dma_log"]
        if self.plan.properties.get("x-device-dirty-page-tracking") == "off":
            # QEMU does not trace the start of the log of a container.
            expect("owners of DMA logs", owners, [])
            owners = ["container"]
        else:
            expect("owners of DMA logs", owners, ["device" if has_log else "IOMMU"])
        # A stopped device writes nothing. Without a peer, there is no DMA.
        some = self.plan.devices > 1 and not paused
        expect("DMA in the logs", pages > 0, some)
        self.view.say(f"DMA log of {owners[0]}: QEMU found {pages} pages in it")

    def pause_busy(self, machine):
        """Pauses the guest while transfers wait in the devices.

        It is paused more than once, so that a transfer that ignores a P2P
        state also reaches a device that has stopped already.
        """
        deadline = time.monotonic() + WORK_TIMEOUT
        pauses = 0
        cycle = 0.0
        while (begin := time.monotonic()) < deadline:
            pauses += 1
            # The guest reports when its transfers have ended: pause it at any
            # time until its next report.
            time.sleep(random.uniform(0.0, cycle))
            machine.qmp.command("stop")
            try:
                waiting = sum(
                    device.dma_under_way(
                        device.read_region(
                            machine.pid, mdev, self.plan.kind.bars["registers"]
                        )
                    )[0]
                    for mdev in machine.mdevs
                )
            except OSError as error:
                raise Failure(f"cannot look into a device: {error}") from None
            if waiting and pauses >= PAUSES:
                self.view.say(
                    f"pause {pauses} of the {machine.name}: "
                    f"{waiting} transfers wait"
                )
                return
            machine.qmp.command("cont")
            self._work(machine, generations=1, irqs=0, transfers=1)
            cycle = time.monotonic() - begin
        raise Failure(f"no transfer waits at the end of {pauses} pauses")

    def leave(self, machine):
        """Takes what the stopped guest has reported so far from its machine."""
        machine.poll()
        machine.guest = None
        return copy.deepcopy(self.guest)

    def enter(self, machine, guest):
        """Continues a guest that has reported this much."""
        self.guest = machine.guest = copy.deepcopy(guest)
        machine.resume()

    def hold(self, machine):
        """Returns the content of the device of a machine that is stopped."""
        (mdev,) = machine.mdevs
        device.finish_loading(machine.pid, mdev)
        return {
            name: device.read_region(machine.pid, mdev, bar)
            for name, bar in self.plan.kind.bars.items()
        }

    def expect_held(self, machine, held):
        """Fails unless the device of a machine that is stopped has this content."""
        for name, content in self.hold(machine).items():
            same(name, held[name], content)

    def compare(self, source, target):
        """Compares the content of both devices, while both are stopped."""
        digest = hashlib.sha256()
        under_way = (0, 0)
        for pair in zip(source.mdevs, target.mdevs):
            sides = list(zip((source.pid, target.pid), pair))
            held = self._held(sides)
            for name, (one, other) in held.items():
                same(name, one, other)
            memory = held["memory"][0]
            if memory.count(0) > len(memory) // 2:
                raise Failure("the device's memory is empty: nothing is proved")
            digest.update(memory)
            if self.plan.devices > 1:
                under_way = expect_dma(held["registers"][0], under_way)
        if self.plan.devices > 1:
            self.view.say(
                f"DMA at switchover: {under_way[0]} transfers wait, "
                f"{under_way[1]} without end"
            )
        return digest.hexdigest()

    def _held(self, sides):
        """Returns the regions of one device on the sides (pid, mdev)."""
        kind = self.plan.kind
        try:
            device.finish_loading(*sides[1])
            held = {
                name: [device.read_region(*side, bar) for side in sides]
                for name, bar in kind.bars.items()
            }
        except OSError as error:
            raise Failure(f"cannot look into a device: {error}") from None
        if kind.dropped is not None:
            for name, bar in zip(("source", "target"), held["registers"]):
                (dropped,) = struct.unpack_from("<Q", bar, kind.dropped)
                expect(f"writes that the {name}'s device dropped", dropped, 0)
        return held

    def work_on(self, machine):
        """Checks that guest and devices continue to work."""
        wait(
            [machine],
            lambda: all(m.state() == "RUNNING" for m in machine.mdevs),
            WORK_TIMEOUT,
            f"the device of the {machine.name} runs",
        )
        self._work(machine, generations=16, irqs=2)

    def _work(self, machine, generations, irqs, transfers=TRANSFERS):
        """Waits for this amount of additional work of each kind."""
        goal = {"gen": self.guest.count("gen") + generations}
        if self.plan.kind.interrupts:
            goal["irqs"] = self.guest.count("irqs") + irqs
        if self.plan.devices > 1:
            goal["transfers"] = self.guest.count("transfers") + transfers
        wait(
            [machine],
            lambda: self.guest.reaches(**goal),
            WORK_TIMEOUT,
            f"the guest works on the {machine.name}",
        )

    def verify(self, machine):
        """Makes the guest compare its whole device with its model."""
        known = len(self.guest.verdicts)
        machine.send("verify")
        self._verdict(machine, known)

    def _verdict(self, machine, known):
        """Returns the guest's next result after the `known` ones."""
        wait(
            [machine],
            lambda: len(self.guest.verdicts) > known,
            VERIFY_TIMEOUT,
            f"the guest's check on the {machine.name}",
            patient=True,
        )
        verdict = self.guest.verdicts[-1]
        self.view.say(
            f"guest on the {machine.name}: {verdict['result']}, "
            f"{size(int(verdict['checksummed']))} by checksum, "
            f"{size(int(verdict['readback']))} read back, "
            f"{verdict['checks']} checks so far"
        )
        self.view.say(f"guest works: {self.guest.work_done()}")
        if verdict["result"] != "ok" or verdict["mismatches"] != "0":
            raise Failure(f"the guest's check fails: {self.guest.troubles[0]}")

    def quit(self, machine):
        """Makes the guest power off."""
        machine.send("quit")

        def turned_off():
            # The guest waits until its reports are read.
            machine.receive()
            return machine.shutdown()

        reason = wait([], turned_off, QUIT_TIMEOUT, "the guest turns off")
        expect("why the guest ended", reason, "guest-shutdown")
        self.drop(machine)

    def summary(self, sample):
        """Returns a summary in one line."""
        return (
            f"state {size(int(self.guest.ready['state_size']))}, "
            f"streamed {size(sample.sent)} in {sample.rounds} rounds, "
            f"downtime {sample.info['downtime']} ms, "
            "devices equal at switchover, guest's check on the target ok"
        )


class Sample:
    """State of a migration according to QEMU and the devices."""

    def __init__(self, source, target):
        self.state = states(source.mdevs)
        self.target_state = states(target.mdevs)
        self.left = device.bytes_left(source.pid)
        self.info = source.qmp.command("query-migrate")
        self.status = self.info.get("status", "none")
        self.sent = self.info.get("vfio", {}).get("transferred", 0)
        # A round ends when QEMU queries the remaining data of all devices.
        self.rounds = self.info.get("ram", {}).get("dirty-sync-count", 0)

    def __str__(self):
        initial, dirty = map(size, self.left) if self.left else "--"
        return (
            f"{self.state or '-':12} {self.target_state or '-':11} "
            f"{initial:>10} {dirty:>10} {size(self.sent):>10} {self.rounds:5}"
        )


def states(mdevs):
    """The states of devices, one if they agree."""
    return "/".join(dict.fromkeys(mdev.state() for mdev in mdevs))


def source_states(features, paused=False):
    """Returns the states of a source device, according to its features."""
    p2p = "p2p" in features
    if paused:
        start = []
    elif "pre-copy" in features:
        start = ["PRE_COPY", "PRE_COPY_P2P"] if p2p else ["PRE_COPY"]
    else:
        start = ["RUNNING_P2P", "STOP"] if p2p else ["STOP"]
    return [*start, "STOP_COPY", "STOP"]


def target_states(features):
    """Returns the states of a target device."""
    if "p2p" in features:
        return ["RESUMING", "RUNNING_P2P", "RUNNING"]
    return ["RESUMING", "RUNNING"]


def follow(what, machine, way, view):
    """Fails unless all devices went through these states, in step at P2P states.

    The first device may leave a P2P state only when all devices of the machine
    are in it. Names of states that the kernel does not have are ignored.
    """
    known = [event for event in machine.states if event[1] in device.STATES]
    foreign = dict.fromkeys(
        state for _, state in machine.states if state not in device.STATES
    )
    if foreign:
        view.say(f"{what}'s QEMU also reports {', '.join(foreign)}")
    for number, _ in enumerate(machine.mdevs):
        went = [state for n, state in known if n == number]
        # A state that is reported twice was entered once.
        expect(f"{what}'s states", [state for state, _ in groupby(went)], way)
    order = [state for _, state in known]
    for state, then in pairwise(way):
        if state.endswith("_P2P") and state in order[order.index(then) :]:
            raise Failure(f"{what}: {then} before all were in {state}")


def expect_dma(registers, before):
    """Checks that a device has pending DMA, and adds its numbers to `before`."""
    queued, endless = device.dma_under_way(registers)
    expect("transfers without end", endless, ENDLESS)
    return before[0] + queued, before[1] + endless


def same(what, one, other):
    """Fails unless two regions are equal, and reports the differences."""
    if one == other:
        return
    if len(one) != len(other):
        raise Failure(f"{what}: {len(one)} and {len(other)} bytes")
    bad = [i for i, (a, b) in enumerate(zip(one, other)) if a != b]
    raise Failure(
        f"{what}: {len(bad)} bytes differ between source and target, "
        f"first at 0x{bad[0]:x}, last at 0x{bad[-1]:x}"
    )


def migrate(scenario):
    """The guest migrates while it works."""
    source = scenario.boot()
    target = scenario.target()
    sample = scenario.complete(source, target)
    scenario.verify(target)
    scenario.quit(target)
    return scenario.summary(sample)


def ends(scenario, source, target, status):
    """Waits until a migration ends with a status other than completed; returns its info."""

    def info():
        info = source.qmp.command("query-migrate")
        return info if info["status"] == status else None

    done = wait([source], info, MIGRATE_TIMEOUT, f"the migration is {status}")
    # Both sides may complain that the stream ended early.
    target.close()
    scenario.machines.remove(target)
    scenario.judge(target)
    return done


def cancel(scenario):
    """Migrations are cancelled and fail, and one completes when the host lets it."""
    source = scenario.boot()
    target = scenario.target("target")
    scenario.half_way(source, target)
    source.qmp.command("migrate_cancel")
    ends(scenario, source, target, "cancelled")
    scenario.work_on(source)
    follow("source", source, ["PRE_COPY", "RUNNING"], scenario.view)
    source.excuse()
    scenario.view.say("cancelled half-way, the source continues")
    scenario.verify(source)

    for name in ("read", "write"):
        cases.play_case(scenario, source, name, cases.CASES[name])
    step = cases.STEPS["converge"]
    target, sample = cases.play_step(scenario, source, "converge", step)
    scenario.verify(target)
    scenario.quit(target)
    return "cancelled half-way, then failed twice, then " + scenario.summary(sample)


def peers(scenario):
    """Two devices do DMA to each other while they migrate, there and back.

    Then they migrate again with the guest paused and transfers waiting.
    """
    source = scenario.boot()
    for name, paused in (("target", False), ("third", False), ("last", True)):
        target = scenario.target(name)
        if paused:
            scenario.pause_busy(source)
        # Verify before the guest overwrites the results of the source.
        sample = scenario.complete(source, target, verify=True, paused=paused)
        source = target
    scenario.verify(source)
    scenario.quit(source)
    return scenario.summary(sample)


def stopped(scenario):
    """The guest is stopped in mid-migration, and arrives stopped."""
    source = scenario.boot()
    target = scenario.target()

    def stop():
        scenario.tell_bandwidth(source)
        source.qmp.command("stop")

    sample = scenario.complete(source, target, half_way=stop)
    scenario.verify(target)
    scenario.quit(target)
    return "stopped half-way, then " + scenario.summary(sample)


def pause_cancel(scenario):
    """The guest is paused in mid-migration, which is cancelled: the device runs on."""
    source = scenario.boot()
    target = scenario.target()
    scenario.half_way(source, target)
    source.qmp.command("stop")
    source.qmp.command("migrate_cancel")
    ends(scenario, source, target, "cancelled")
    expect("the guest", source.qmp.command("query-status")["status"], "paused")
    expect("the device", states(source.mdevs), "RUNNING")
    source.excuse()
    source.qmp.command("cont")
    scenario.work_on(source)
    scenario.verify(source)
    scenario.quit(source)
    return "QEMU runs the device of a paused guest"


def reset(scenario):
    """A reset of the guest in mid-migration ends the migration."""
    source = scenario.boot()
    target = scenario.target()
    scenario.half_way(source, target)
    source.qmp.command("set-action", {"reboot": "reset"})
    source.qmp.command("system_reset")
    info = ends(scenario, source, target, "failed")
    if "No such device" not in info.get("error-desc", ""):
        raise Failure(f"another error: {info}")
    expect("the device", states(source.mdevs), "RUNNING")
    source.excuse()
    # The guest boots again, which is not waited for.
    scenario.drop(source)
    return info["error-desc"]


def remove(scenario):
    """The host asks for the source's device in mid-migration, which completes."""
    source = scenario.boot()
    target = scenario.target()
    scenario.half_way(source, target)
    request = subprocess.Popen(
        ["sh", "-c", 'echo 1 >"$0/remove"', scenario.source_mdevs[0].path]
    )
    wait(
        [source],
        lambda: any("not allowed while migrating" in c for c in source.complaints()),
        MIGRATE_TIMEOUT,
        "QEMU warns",
    )
    source.excuse()
    bandwidth = {"max-bandwidth": scenario.options.bandwidth << 20}
    source.qmp.command("migrate-set-parameters", bandwidth)
    wait([source, target], target.migrated, MIGRATE_TIMEOUT, "the target takes all")
    if request.poll() is not None:
        raise Failure("the device is removed while it is in use")
    target.guest, source.guest = scenario.guest, None
    target.qmp.command("cont")
    scenario.work_on(target)
    scenario.verify(target)
    source.close()
    scenario.machines.remove(source)
    expect("the removal", request.wait(QUIT_TIMEOUT), 0)
    scenario.quit(target)
    return "the source's device is removed when its QEMU ends"


def saved(scenario):
    """The guest is saved in a file, and restored from it twice."""
    source = scenario.boot()
    file = {"uri": f"file:{scenario.options.folder / 'guest'}"}
    source.pause_at_switchover()
    source.qmp.command("migrate", file)
    wait([source], source.migrated, MIGRATE_TIMEOUT, "the guest is saved")
    guest = scenario.leave(source)
    for name in ("first", "second"):
        target = scenario.target(name)
        target.qmp.command("migrate-incoming", file)
        wait([target], target.migrated, MIGRATE_TIMEOUT, "the guest is restored")
        digest = scenario.compare(source, target)
        scenario.view.say(f"device of the {name} target: equal, sha256 {digest[:16]}")
        scenario.enter(target, guest)
        scenario.verify(target)
        scenario.work_on(target)
        scenario.quit(target)
    scenario.drop_source(source)
    return "saved in a file, restored twice, devices equal, guest's checks ok"


def snapshot(scenario):
    """The guest is saved in a snapshot, and continues from it twice."""
    source = scenario.boot()
    source.add_disk()
    # Lets the main loop of QEMU deliver interrupts that the device has raised.
    source.qmp.command("stop")
    source.snapshot("save")
    guest = scenario.leave(source)
    held = scenario.hold(source)
    scenario.enter(source, guest)
    for number in (1, 2):
        scenario.work_on(source)
        source.qmp.command("stop")
        changed = scenario.hold(source)
        if changed["memory"] == held["memory"]:
            raise Failure("the device has not changed since the snapshot")
        source.snapshot("load")
        scenario.leave(source)
        scenario.expect_held(source, held)
        scenario.view.say(f"load {number}: the device is that of the snapshot")
        scenario.enter(source, guest)
        scenario.verify(source)
    scenario.work_on(source)
    scenario.quit(source)
    return "snapshot saved, loaded twice, device restored, guest's checks ok"


def variant(scenario):
    """The picture of a display moves to another one, seen from outside."""
    outside = Outside(scenario.options.pictures)
    scenario.stack.callback(outside.close)
    pictures = []

    def look():
        """Takes screenshots of both displays."""
        pictures.append([outside.screen(f"display{number}") for number in (1, 2)])

    source = scenario.boot()
    look()
    expect_picture(*pictures[0])
    target = scenario.target()
    sample = scenario.complete(source, target, at_switchover=look)
    one, other = pictures[1]
    if one != other:
        raise Failure("the displays differ at switchover, seen from outside")
    scenario.view.say(
        f"displays at switchover: the same picture of {one.width}x{one.height} "
        f"with {one.colours()} colours"
    )
    scenario.verify(target)
    look()
    expect_picture(*reversed(pictures[2]))
    write_png(scenario.options.pictures / "displays.png", pictures)
    scenario.quit(target)
    return "the picture moves, " + scenario.summary(sample)


def expect_picture(shown, other):
    """Fails unless the first of two displays shows a picture, and the other one none."""
    if shown.colours() < 1000:
        raise Failure("a display shows no picture")
    if other.colours() > 10:
        raise Failure("a display shows a picture that it must not")


# Without a feature that migration needs, QEMU must not even start.
REQUIRED = {"enable-migration": "on"}

# Kernels of distributions may lack iommufd.
HAVE_IOMMUFD = Path("/dev/iommu").exists()
ANY = ["iommufd" if HAVE_IOMMUFD else "group"]

# Steps of a scenario and options of the VMM for it. The backends alternate. Scenarios with
# `more` run only if they are named. With `function`, the devices are software PCI functions
# with these settings.
Plan = namedtuple(
    "Plan",
    "play title backends kind capabilities properties devices more function vmm",
    defaults=(device.MOCK, (), REQUIRED, 1, False, None, Machine),
)

SCENARIOS = {
    "group": Plan(migrate, "group and container", ["group"]),
    "iommufd": Plan(migrate, "character device and iommufd", ["iommufd"]),
    "cancel": Plan(cancel, "cancelled half-way, failed, and completed once it converges", ANY),
    "multifd": Plan(
        migrate,
        "device state over a channel of its own, switchover acknowledged",
        ["iommufd"],
        capabilities=("multifd", "return-path", "switchover-ack"),
        properties=REQUIRED | {"x-migration-multifd-transfer": "on"},
    ),
    "peers": Plan(
        peers,
        "two devices, DMA into each other, to and fro over both backends",
        ["group", "iommufd"],
        device.PEER,
        # Like for users: QEMU relies on the DMA logs, or does not migrate.
        properties={},
        devices=2,
    ),
    "minimal": Plan(
        migrate,
        "vfio_minimal device, character device and iommufd",
        ["iommufd"],
        device.MINIMAL,
    ),
    "stop": Plan(stopped, "stopped half-way, arrives stopped", ANY, more=True),
    "pause-cancel": Plan(
        pause_cancel, "paused half-way, then cancelled", ANY, more=True
    ),
    "reset": Plan(reset, "guest reset half-way", ANY, more=True),
    "remove": Plan(remove, "device of the source removed half-way", ANY, more=True),
    "faults": Plan(
        cases.play_cases,
        "devices that fail: " + ", ".join(cases.CASES),
        ANY,
        device.MOCK._replace(type="vfio_mock-1M"),
        more=True,
    ),
    "load": Plan(
        cases.play_steps,
        "devices that are slow, busy or lie: " + ", ".join(cases.STEPS),
        ANY,
        more=True,
    ),
    "saved": Plan(saved, "saved in a file, restored twice", ANY, more=True),
    "snapshot": Plan(snapshot, "snapshot saved, loaded twice", ANY, more=True),
    "untracked": Plan(
        migrate,
        "two devices whose DMA logs are not used, but that of the container",
        ["group"],
        device.PEER,
        properties=REQUIRED | {"x-device-dirty-page-tracking": "off"},
        devices=2,
        more=True,
    ),
    "ch": Plan(
        cloud_hypervisor.play,
        "from one Cloud Hypervisor to another, then to a snapshot and from there",
        ["iommufd"],
        more=True,
        vmm=CloudHypervisor,
    ),
    "ch-faults": Plan(
        cloud_hypervisor.play_cases,
        "devices that fail: " + ", ".join(cloud_hypervisor.CASES),
        ["iommufd"],
        device.MOCK._replace(type="vfio_mock-1M"),
        more=True,
        vmm=CloudHypervisor,
    ),
    "variant": Plan(
        variant,
        "variant driver of a PCI device, its picture moves from display to display",
        ["group", "iommufd"],
        device.DISPLAY,
        # The IOMMU has no log of DMA: QEMU takes all memory for written. It must not
        # do that in each round, or there is no end to them.
        properties=REQUIRED | {"x-pre-copy-dirty-page-tracking": "off"},
        more=True,
    ),
}

# The same with software PCI functions. For those without a DMA log, QEMU uses that of the
# IOMMU, but only with an iommufd.
for usual in ("group", "iommufd", "cancel", "multifd", "peers"):
    SCENARIOS[f"{usual}-pci"] = SCENARIOS[usual]._replace(
        title=f"like {usual}, with PCI functions",
        function={"dma_log": 1},
        more=True,
    )
    SCENARIOS[f"{usual}-iommu"] = SCENARIOS[usual]._replace(
        title=f"like {usual}, with PCI functions and the DMA log of the IOMMU",
        backends=["iommufd"],
        function={"dma_log": 0},
        more=True,
    )
# This is iommufd-iommu.
del SCENARIOS["group-iommu"]


def save(options):
    """Boots a guest without devices and saves it; returns the exit status."""
    guest = Guest()
    with tempfile.TemporaryDirectory(prefix="vfio-demo-") as folder:
        options.folder = Path(folder)
        machine = Machine("boot", options, guest=guest)
        try:
            machine.start(BOOT_TIMEOUT)
            machine.run()
            wait([machine], lambda: guest.lines, BOOT_TIMEOUT, "the guest boots")
            machine.save(options.save)
        except (Failure, QmpError) as error:
            for line in machine.diagnostics():
                print(line, file=sys.stderr)
            print(error, file=sys.stderr)
            return 1
        finally:
            machine.close()
    return 0


def run(name, options, view):
    """Runs one scenario; returns its result and a line about it."""
    plan = SCENARIOS[name]
    view.say(f"{name}: {plan.title}")
    if "iommufd" in plan.backends and not HAVE_IOMMUFD:
        return "SKIP", "the kernel has no iommufd"
    if plan.vmm is CloudHypervisor and not options.cloud_hypervisor:
        return "SKIP", "CH does not name a folder with cloud-hypervisor and ch-remote"
    with tempfile.TemporaryDirectory(prefix="vfio-demo-") as folder:
        options.folder = Path(folder)
        scenario = Scenario(options, plan, view)
        try:
            try:
                return "PASS", plan.play(scenario)
            except (Failure, QmpError, OSError) as error:
                view.settle()
                diagnose(scenario, view)
                reasons = dict.fromkeys([str(error), *ended(scenario)])
                return "FAIL", "; ".join(reasons)
            finally:
                scenario.close()
        except OSError as error:
            return "FAIL", f"cannot clean up: {error}"


def ended(scenario):
    """Returns the exit status of each VMM that has ended, and of its guest."""
    for machine in scenario.machines:
        reason = machine.shutdown()
        if reason:
            yield f"the {machine.name} guest ended by itself: {reason}"
        if machine.gone():
            yield machine.fate()


def diagnose(scenario, view):
    """Shows all information that may explain a failure."""
    for mdev in (*scenario.source_mdevs, *scenario.target_mdevs):
        view.say(f"device {mdev.name}: {mdev.state()}")
    for machine in scenario.machines:
        for line in machine.diagnostics():
            view.say(line)
    dmesg = subprocess.run(
        ["dmesg"], capture_output=True, text=True, check=False
    )
    for line in dmesg.stdout.splitlines()[-20:]:
        view.say(f"kernel: {line}")


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Scenarios: "
        + "; ".join(f"{name}: {p.title}" for name, p in SCENARIOS.items()),
    )
    add = parser.add_argument
    usual = [name for name, plan in SCENARIOS.items() if not plan.more]
    add("scenario", nargs="*", default=usual, help="scenarios to run")
    add("--case", action="append", help="play only this case of faults, load or ch-faults")
    add("--more", action="store_true", help="run all scenarios that are not the default")
    add(
        "--machine",
        choices=("plain", "displays"),
        help="run those of the scenarios that are for this kind of machine",
    )
    add("--list", action="store_true", help="only print the names of the scenarios")
    add("--kernel", required=True, help="kernel of the guest")
    add("--initramfs", required=True, help="initramfs, from initramfs.py")
    add("--append", default="", help="more options for the guest's kernel")
    add("--qemu", default="qemu-system-x86_64", help="the QEMU to run")
    add("--cloud-hypervisor", type=Path, help="folder with cloud-hypervisor and ch-remote")
    add("--memory", default="160", help="memory of the guest in MiB")
    add("--type", default=device.MOCK.type, help="type of vfio_mock devices")
    add("--bandwidth", type=int, default=32, help="limit in MiB/s")
    add(
        "--slow-bandwidth",
        type=int,
        default=8,
        help="limit in MiB/s of a migration to be cancelled",
    )
    add("--accel", default="kvm", help="accelerator that runs the guests")
    file = parser.add_mutually_exclusive_group()
    file.add_argument(
        "--save",
        metavar="FILE",
        help="boot a guest without devices, and save it in a file",
    )
    file.add_argument(
        "--restore",
        metavar="FILE",
        help="plug the devices into the guest in a file, instead of booting one",
    )
    add("--pictures", type=Path, help="folder for screenshots of the test machine")
    add("--tap", action="store_true", help="print TAP")
    add("--columns", type=int, default=0, help="width of the terminal, if any")
    options = parser.parse_intermixed_args(argv)
    if options.more:
        options.scenario = [name for name in SCENARIOS if name not in usual]
    for name in options.scenario:
        if name not in SCENARIOS:
            parser.error(f"no scenario {name}")
    for name in options.case or ():
        if name not in cases.CASES | cases.STEPS | cloud_hypervisor.CASES:
            parser.error(f"no case {name}")
    if options.machine:
        displays = options.machine == "displays"
        options.scenario = [
            name
            for name in options.scenario
            if (SCENARIOS[name].kind is device.DISPLAY) == displays
        ]
    if not shutil.which(options.qemu):
        parser.error(f"{options.qemu}: not found")
    return options


def main(argv):
    """Runs the scenarios; status 0 only if none of them fails."""
    options = parse(argv)
    # End QEMU, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.list:
        print(*options.scenario)
        return 0
    if options.save:
        return save(options)
    names = options.scenario
    if options.tap:
        view = View(prefix="# ")
        print(f"TAP version 13\n1..{len(names)}", flush=True)
    else:
        view = View(columns=options.columns)
    failed = 0
    for number, name in enumerate(names, 1):
        word, text = run(name, options, view)
        failed += word == "FAIL"
        if options.tap:
            ok = "not ok" if word == "FAIL" else "ok"
            mark = " # SKIP" if word == "SKIP" else ":"
            print(f"{ok} {number} - {name}{mark} {text}", flush=True)
        else:
            view.say(f"{name}: {word}: {text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
