# SPDX-License-Identifier: GPL-2.0
"""Devices that misbehave in a migration: the knobs, and what QEMU makes of them.

Each table is played with one guest. Documentation/vfio_vmms.rst has the results.
"""

import signal
from collections import namedtuple

from machine import Failure, Guest, expect, wait

END_TIMEOUT = 240

# Those that a migration has only if it names them.
CAPABILITIES = ("multifd", "return-path", "switchover-ack")

# What a migration with a fault leads to, apart from its status.
REFUSED = "the guest goes on at the source"
UNSTOPPED = "the guest goes on at the source, and was never stopped"
RESET = "QEMU resets the device of the source, and the guest goes on with that"
LOST = "QEMU resets the device of the target, and the guest goes on with that"
ABORTED = "QEMU aborts"

# A migration that fails. `source` and `target` have knobs: for all of the migration, or
# with `stopped`, after the devices of the source have stopped. The migration is
# cancelled if that is the status to expect. All but the last ones leave the guest intact.
Case = namedtuple(
    "Case",
    "outcome source target stopped status capabilities",
    defaults=({}, {}, False, "failed", ()),
)


def faults(rules, **more):
    """Knobs with these rules for faults."""
    return {"faults": rules} | more


# The source stays in pre-copy, until the target has refused the stream.
ENDLESS = {"dirty_bytes": 1 << 30}

CASES = {
    "start": Case(REFUSED, faults("arc RUNNING->PRE_COPY")),
    "read": Case(REFUSED, faults("read after=65536")),
    "read-stopped": Case(REFUSED, faults("read"), stopped=True),
    "size-0": Case(
        REFUSED, {"initial_bytes": 0, "dirty_bytes": 0, "tail_bytes": 0}
    ),
    "log-start": Case(UNSTOPPED, faults("log_start errno=ENOMEM")),
    "log-report": Case(UNSTOPPED, faults("log_report")),
    "version": Case(UNSTOPPED, {"stream_version": 2} | ENDLESS),
    "features": Case(UNSTOPPED, {"stream_features": 1} | ENDLESS),
    "target-quiesce": Case(REFUSED, target=faults("arc RUNNING->RUNNING_P2P")),
    "target-stop": Case(REFUSED, target=faults("arc RUNNING_P2P->STOP")),
    "target-start": Case(REFUSED, target=faults("arc STOP->RESUMING")),
    "target-broken": Case(REFUSED, target=faults("arc STOP->RESUMING state=ERROR")),
    "write": Case(REFUSED, target=faults("write after=65536")),
    # Without a return path, the source may complete before it notices.
    "write-stopped": Case(
        REFUSED,
        target=faults("write"),
        stopped=True,
        capabilities=("return-path",),
    ),
    "no-room": Case(REFUSED, target=faults("write after=524288 errno=ENOSPC")),
    # Each write, because a page that is damaged may arrive again.
    "corrupt": Case(
        REFUSED,
        target=faults("write times=-1 xor=1"),
        stopped=True,
        capabilities=("return-path",),
    ),
    "target-end": Case(
        LOST, target=faults("arc RESUMING->STOP"), status="completed"
    ),
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
    "back-run": Case(RESET, faults("read; arc RUNNING_P2P->RUNNING"), stopped=True),
    "end": Case(RESET, faults("arc STOP_COPY->STOP"), status="completed"),
    "reset": Case(ABORTED, faults("arc PRE_COPY->PRE_COPY_P2P; reset")),
}

# A migration that completes. `source` has knobs from the start, `then` those to set after
# the state was streamed and the given number of rounds, with a limit for the downtime in
# milliseconds. `target` has knobs to set while the guest is stopped. The downtime is at
# least `downtime` milliseconds.
Step = namedtuple(
    "Step",
    "source rounds then limit target downtime capabilities queue advice",
    defaults=({}, 0, {}, None, {}, 0, (), None, None),
)

# So much that all of the device is dirty when a round ends, and when it stops.
DIRTY = {"dirty_rate": 1 << 30}
MIB = 1 << 20
LONG = 60000

STEPS = {
    "converge": Step(DIRTY, 4, {"dirty_rate": 0}),
    "size-error": Step(faults("size times=-1"), 10, faults("off")),
    "size-large": Step({"dirty_bytes": 1 << 30}, 10, {"dirty_bytes": "exact"}),
    "size-small": Step(
        DIRTY | {"dirty_bytes": 0, "save_rate": 8 * MIB}, downtime=1500
    ),
    "bandwidth": Step(
        DIRTY | {"save_rate": 4 * MIB}, 3, limit=LONG, downtime=3000
    ),
    "delay": Step(
        faults("arc PRE_COPY_P2P->STOP_COPY delay_us=2000000"), downtime=2000
    ),
    "slow": Step(
        DIRTY, 3, limit=LONG, target={"load_rate": 2 * MIB}, downtime=6000, queue=False
    ),
    "slow-multifd": Step(
        DIRTY,
        3,
        limit=LONG,
        target={"load_rate": 2 * MIB},
        capabilities=CAPABILITIES,
        queue=True,
    ),
    "reinit": Step(
        DIRTY,
        3,
        {"reinit": 1, "dirty_rate": 0},
        LONG,
        capabilities=("return-path", "switchover-ack"),
        advice="reinit_not_seen",
    ),
    "reinit-late": Step(
        faults("arc PRE_COPY->PRE_COPY_P2P reinit=1", save_rate=8 * MIB), downtime=1500
    ),
}

# More memory than QEMU needs for the target's device, unless it queues the stream.
QUEUE = 8 * MIB


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
            # Each write is an order.
            knobs.pop("reinit", None)
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
        finish(scenario, source)
    return f"{len(chosen(scenario, CASES))} migrations with faults"


def finish(scenario, source):
    """Ends the guest, and checks it before unless its device was reset."""
    if scenario.guest.troubles:
        scenario.drop(source)
    else:
        scenario.verify(source)
        scenario.quit(source)


def play_case(scenario, source, name, case):
    """One migration that fails."""
    target = scenario.target(name)
    (one,), (other,) = source.mdevs, target.mdevs
    knobs = Knobs()
    for machine in (source, target):
        machine.allow(*case.capabilities, among=CAPABILITIES)

    def turn():
        knobs.turn(one, case.source)
        knobs.turn(other, case.target)

    if case.stopped:
        source.before_switchover = turn
    else:
        turn()
    resets = one.statistics().get("resets")
    cancel = case.status == "cancelled"
    options = scenario.options

    def begun():
        # The guest may have found that its device was reset by another case.
        source.poll()
        return one.state() == "PRE_COPY"

    scenario.begin(
        source, target, options.slow_bandwidth if cancel else options.bandwidth
    )
    if cancel:
        wait([], begun, END_TIMEOUT, "pre-copy")
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
        resets = target.mdevs[0].statistics().get("resets")
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
    if case.outcome is UNSTOPPED:
        stopped = "STOP_COPY" in (state for _, state in source.states)
        expect("the device was stopped", stopped, False)
    if case.outcome is RESET:
        notices(source)
    else:
        scenario.work_on(source)


def expect_resets(machine, before, count):
    """Checks how often QEMU has reset its device since a number."""
    now = machine.mdevs[0].statistics().get("resets")
    if now is not None:
        expect(f"resets of the {machine.name}'s device", now - before, count)


def notices(machine):
    """Waits until the guest finds that its device was reset."""

    def found():
        machine.poll()
        return machine.guest.troubles

    wait([], found, END_TIMEOUT, "the guest finds that its device was reset")


def play_steps(scenario):
    """Migrations that complete after a while, with one guest."""
    source = scenario.boot()
    for name, step in chosen(scenario, STEPS).items():
        source, _ = play_step(scenario, source, name, step)
    scenario.verify(source)
    scenario.quit(source)
    return f"{len(chosen(scenario, STEPS))} migrations"


def play_step(scenario, source, name, step):
    """One migration that completes; returns the target and the last sample."""
    target = scenario.target(name)
    (one,), (other,) = source.mdevs, target.mdevs
    knobs = Knobs()
    grown = base = sent = 0
    for machine in (source, target):
        machine.allow(*step.capabilities, among=CAPABILITIES)

    def held(sample):
        if sample.status in ("completed", "failed"):
            raise Failure(f"{name}: {sample.status} in spite of the knobs")
        initial = sample.left[0] if sample.left else 0
        return sample.rounds >= step.rounds and not initial

    def begun():
        if step.rounds:
            scenario.watch(source, target, held)
            knobs.turn(one, step.then)
        if step.limit:
            limit = {"downtime-limit": step.limit}
            source.qmp.command("migrate-set-parameters", limit)

    def stopped():
        nonlocal base, sent
        knobs.turn(other, step.target)
        sent = one.statistics().get("read_bytes", 0)
        target.forget_peak()
        base = target.memory("VmRSS")

    def loaded():
        nonlocal grown
        grown = target.memory("VmHWM") - base

    knobs.turn(one, step.source)
    source.before_switchover = stopped
    sample = scenario.complete(source, target, begun=begun, at_switchover=loaded)
    knobs.restore()
    downtime = sample.info["downtime"]
    scenario.view.say(
        f"{name}: {sample.rounds} rounds, downtime {downtime} ms, "
        f"memory of the target's QEMU grows by {grown >> 10} KiB at the switchover"
    )
    statistics = one.statistics()
    if statistics:
        left = statistics["read_bytes"] - sent
        line = f"{name}: {left >> 10} KiB in {statistics['STOP_COPY_us'] // 1000} ms"
        if step.source.get("save_rate"):
            needed = left / step.source["save_rate"]
            line += f", {statistics['STOP_COPY_us'] / 1e4 / needed:.0f} % of bytes / save_rate"
        scenario.view.say(line)
    if downtime < step.downtime:
        raise Failure(f"{name}: downtime {downtime} ms, not {step.downtime}")
    if step.queue is not None:
        expect(f"{name}: the target's QEMU queues", grown > QUEUE, step.queue)
    verdict = one.verdict()
    if step.advice and verdict:
        told = any(line.startswith(f"advice: {step.advice}:") for line in verdict)
        expect(f"{name}: the advice {step.advice}", told, True)
    return target, sample
