# SPDX-License-Identifier: GPL-2.0
"""Devices that misbehave in a migration: the knobs, and what QEMU makes of them.

The table is played with one guest. Documentation/vfio_vmms.rst has the results.
"""

import signal
from collections import namedtuple

from machine import Guest, expect, wait

END_TIMEOUT = 240

# What a migration with a fault leads to, apart from its status.
REFUSED = "the guest goes on at the source"
RESET = "QEMU resets the device of the source, and the guest goes on with that"
LOST = "QEMU resets the device of the target, and the guest goes on with that"
ABORTED = "QEMU aborts"

# A migration that fails. `source` and `target` have knobs: for all of the migration, or
# with `stopped`, after the devices of the source have stopped. The migration is
# cancelled if that is the status to expect. All but the last ones leave the guest intact.
Case = namedtuple(
    "Case", "outcome source target stopped status", defaults=({}, {}, False, "failed")
)


def faults(rules, **more):
    """Knobs with these rules for faults."""
    return {"faults": rules} | more


CASES = {
    "start": Case(REFUSED, faults("arc RUNNING->PRE_COPY")),
    "read": Case(REFUSED, faults("read after=65536")),
    "read-stopped": Case(REFUSED, faults("read"), stopped=True),
    "size-0": Case(
        REFUSED, {"initial_bytes": 0, "dirty_bytes": 0, "tail_bytes": 0}
    ),
    "target-start": Case(REFUSED, target=faults("arc STOP->RESUMING")),
    "target-broken": Case(REFUSED, target=faults("arc STOP->RESUMING state=ERROR")),
    "write": Case(REFUSED, target=faults("write after=65536")),
    "write-stopped": Case(REFUSED, target=faults("write"), stopped=True),
    "no-room": Case(REFUSED, target=faults("write after=524288 errno=ENOSPC")),
    "loaded": Case(LOST, target=faults("loaded"), status="completed"),
    "loaded-broken": Case(
        LOST, target=faults("loaded state=ERROR"), status="completed"
    ),
    "target-p2p": Case(
        LOST, target=faults("arc STOP->RUNNING_P2P"), status="completed"
    ),
    "target-run": Case(
        LOST, target=faults("arc RUNNING_P2P->RUNNING"), status="completed"
    ),
    "p2p": Case(RESET, faults("arc PRE_COPY->PRE_COPY_P2P")),
    "stop": Case(RESET, faults("arc PRE_COPY_P2P->STOP_COPY")),
    "seal": Case(RESET, faults("seal errno=ENOSPC")),
    "broken": Case(RESET, faults("arc PRE_COPY_P2P->STOP_COPY state=ERROR")),
    "cancel": Case(RESET, faults("arc PRE_COPY->RUNNING"), status="cancelled"),
    "back": Case(RESET, faults("read; arc STOP->RUNNING_P2P"), stopped=True),
    "end": Case(RESET, faults("arc STOP_COPY->STOP"), status="completed"),
    "reset": Case(ABORTED, faults("arc PRE_COPY->PRE_COPY_P2P; reset")),
}


class Knobs:
    """Settings of devices, until they are restored."""

    def __init__(self):
        self.former = []

    def turn(self, mdev, knobs):
        """Sets knobs of a device."""
        self.former.append((mdev, mdev.turn(knobs)))

    def restore(self):
        """Restores all of them."""
        while self.former:
            mdev, knobs = self.former.pop()
            mdev.turn(knobs)


def chosen(scenario, table):
    """Returns the entries to play."""
    names = scenario.options.case or table
    return {name: entry for name, entry in table.items() if name in names}


def play_cases(scenario):
    """Migrations that fail, with one guest, which is not checked after a reset."""
    source = scenario.boot()
    for name, case in chosen(scenario, CASES).items():
        play_case(scenario, source, name, case)
        if source.process.poll() is not None:
            break
    else:
        if scenario.guest.troubles:
            scenario.drop(source)
        else:
            scenario.verify(source)
            scenario.quit(source)
    return f"{len(chosen(scenario, CASES))} migrations with faults"


def play_case(scenario, source, name, case):
    """One migration that fails."""
    target = scenario.target(name)
    (one,), (other,) = source.mdevs, target.mdevs
    knobs = Knobs()

    def turn():
        knobs.turn(one, case.source)
        knobs.turn(other, case.target)

    if case.stopped:
        source.before_switchover = turn
    else:
        turn()
    resets = one.resets()
    cancel = case.status == "cancelled"
    options = scenario.options
    scenario.begin(
        source, target, options.slow_bandwidth if cancel else options.bandwidth
    )
    if cancel:
        wait([source], lambda: one.state() == "PRE_COPY", END_TIMEOUT, "pre-copy")
        source.qmp.command("migrate_cancel")
    if case.outcome is ABORTED:
        status = wait([], source.process.poll, END_TIMEOUT, "QEMU ends")
        expect("how QEMU ends", -status, signal.SIGABRT)
        why = source.complaints()[0]
        scenario.machines.remove(source)
    else:
        why = end(scenario, source, target, case)
    source.before_switchover = None
    source.excuse()
    target.close()
    scenario.machines.remove(target)
    for line in target.complaints():
        scenario.view.say(f"{name}: target QEMU says: {line}")
    scenario.judge(target)
    if case.outcome is not ABORTED:
        survive(scenario, source, case, resets)
    knobs.restore()
    scenario.view.say(f"{name}: {why}: {case.outcome}")


def end(scenario, source, target, case):
    """Waits for the end of a migration; returns its status and the reason."""

    def ended():
        # The guest may find that its device was reset.
        source.poll()
        info = source.qmp.command("query-migrate")
        return info if info["status"] in ("completed", "failed", "cancelled") else None

    info = wait([], ended, END_TIMEOUT, "the end of the migration")
    expect("the migration", info["status"], case.status)
    if info["status"] == "completed":
        wait([target], target.migrated, END_TIMEOUT, "the target takes everything in")
    if case.outcome is LOST:
        resets = target.mdevs[0].resets()
        target.qmp.command("cont")
        target.guest = Guest()
        notices(target)
        expect_resets(target, resets, 1)
    return f"{info['status']}, {info.get('error-desc', 'without an error')}"


def survive(scenario, source, case, resets):
    """Checks guest and device of the source after a migration."""
    if case.status == "completed":
        source.qmp.command("cont")

    def runs():
        source.poll()
        status = source.qmp.command("query-status")["status"]
        return status == "running" and source.mdevs[0].state() == "RUNNING"

    wait([], runs, END_TIMEOUT, "the guest continues")
    expect_resets(source, resets, 1 if case.outcome is RESET else 0)
    if case.outcome is RESET:
        notices(source)
    else:
        scenario.work_on(source)


def expect_resets(machine, before, count):
    """Checks how often QEMU has reset its device since a number."""
    now = machine.mdevs[0].resets()
    if now is not None:
        expect(f"resets of the {machine.name}'s device", now - before, count)


def notices(machine):
    """Waits until the guest finds that its device was reset."""

    def found():
        machine.poll()
        return machine.guest.troubles

    wait([], found, END_TIMEOUT, "the guest finds that its device was reset")
