#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Run vfio-migrate on devices: scenarios.py PROGRAM TOP [TEST...]

Runs in the test machine as root, loads the modules in TOP, and prints TAP.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import xml.etree.ElementTree
from pathlib import Path

BUS = Path("/sys/class/mdev_bus")
DEVICES = Path("/sys/bus/mdev/devices")
CACHE_LINE_SIZE = "config:0x0c"

program, top = "", Path()
folder = Path(tempfile.mkdtemp())


class Failed(Exception):
    """Failure of a test."""


def check(condition, what):
    """Fails with `what` unless the condition holds."""
    if not condition:
        raise Failed(what)


@contextlib.contextmanager
def devices(*types, parent="vfio_mock"):
    """Yields the UUIDs of new devices of these types, and removes them."""
    made = []
    try:
        for size in types:
            new = str(uuid.uuid4())
            kinds = BUS / parent / "mdev_supported_types"
            (kinds / f"{parent}-{size}" / "create").write_text(new)
            made.append(new)
        yield made
    finally:
        for each in made:
            (DEVICES / each / "remove").write_text("1")


@contextlib.contextmanager
def loaded(module, *parameters):
    """Loads a module for the duration of a block."""
    subprocess.run(["insmod", top / f"{module}.ko", *parameters], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", module], check=True)


def run(*arguments):
    """Runs the program and returns its exit code and output."""
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def in_precopy(*arguments):
    """Runs the program, which stays in pre-copy until it is terminated."""
    command = [program, "--precopy-time", "600", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "RESUMING" in line:
                    break
            yield process
        finally:
            process.terminate()
            process.stderr.read()


def migrate(*arguments, code=0):
    """Runs the program, checks its exit code, and returns its record."""
    path = folder / "record.json"
    path.unlink(missing_ok=True)
    status, said = run("--json", path, *arguments)
    check(status == code, f"exit code {status} instead of {code}: {said}")
    return json.loads(path.read_text())


def way(record, device):
    """Returns the states of a device in order."""
    return [s["state"] for s in record["states"] if s["device"] == device]


def clean(record):
    """Checks that the client has broken no rule of the uAPI."""
    for device in ("source", "target"):
        check(record[device]["verdict"] == "clean", record[device]["verdict"])


def compared(record):
    """Returns the number of bytes compared of each equal region."""
    return {r["region"]: r["bytes"] for r in record["compared"] if not r["different"]}


def refused(code, words, *arguments):
    """Checks that the program fails with this code and these words."""
    status, said = run(*arguments)
    check(status == code, f"{arguments}: exit code {status} instead of {code}: {said}")
    for word in words:
        check(word in said, f"{arguments}: {word!r} is not in: {said}")
    check("panicked" not in said, said)


def test_help():
    """--help lists the options and the exit codes"""
    status, said = run("--help")
    check(status == 0, said)
    for word in ("--bandwidth", "--cancel-at-round", "Exit codes", "130"):
        check(word in said, f"{word} is not in: {said}")


def whole(backend):
    """Migrates a busy device, with all options."""
    picture = folder / "picture.svg"
    with devices("1M", "1M") as pair:
        record = migrate(
            *["--backend", backend, "--bandwidth", "4M", "--downtime-limit", "0"],
            *["--fill", "bar2", "--load", "bar2", "--max-rounds", "3"],
            *["--svg", picture, *pair],
        )
    check(record["source"]["backend"] == backend, record["source"])
    check(record["outcome"] == "completed", record["error"])
    clean(record)
    states = ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"]
    check(way(record, "source") == states, way(record, "source"))
    states = ["RESUMING", "STOP", "RUNNING_P2P", "RUNNING"]
    check(way(record, "target") == states, way(record, "target"))
    sizes = {"bar0": 0x4000, "bar2": 1 << 20, "config": 256}
    check(compared(record) == sizes, record["compared"])
    check(record["load_bytes"] > 0, "the load did not write")
    check(record["rounds"][0]["left_bytes"] > 0, "the load left nothing dirty")
    check(record["bytes"] > 1 << 20, record["bytes"])
    check(record["downtime_ms"] > 0, record["downtime_ms"])
    initial = [s["initial_bytes"] for s in record["samples"] if s["round"]]
    check(initial == sorted(initial, reverse=True), initial)
    check(initial[-1] == 0, initial)
    root = xml.etree.ElementTree.parse(picture).getroot()
    check(root.tag.endswith("svg"), root.tag)


def test_group():
    """busy device migrates with a group"""
    whole("group")


def test_iommufd():
    """busy device migrates with an iommufd"""
    whole("iommufd")


def test_auto():
    """iommufd is the default backend"""
    with devices("64K", "64K") as pair:
        record = migrate(*pair)
    check(record["source"]["backend"] == "iommufd", record["source"])


def test_bandwidth():
    """stream does not exceed the bandwidth"""
    with devices("1M", "1M") as pair:
        record = migrate("--bandwidth", "2M", *pair)
    check(record["bytes"] > 1 << 20, record["bytes"])
    check(record["seconds"] >= record["bytes"] / (2 << 20), record["seconds"])


def test_cancel():
    """cancelled migration leaves the source running"""
    with devices("1M", "1M") as pair:
        record = migrate("--cancel-at-round", "2", "--load", "bar2", *pair)
    check(record["outcome"] == "cancelled", record["outcome"])
    check(len(record["rounds"]) == 2, record["rounds"])
    check(way(record, "source") == ["PRE_COPY", "RUNNING"], way(record, "source"))
    check(way(record, "target") == ["RESUMING", "RUNNING"], way(record, "target"))
    clean(record)
    check(record["downtime_ms"] is None, record["downtime_ms"])


def test_idle_cancel():
    """migration of an idle device can be cancelled"""
    with devices("64K", "64K") as pair:
        record = migrate("--cancel-at-round", "3", *pair)
    check(len(record["rounds"]) == 3, record["rounds"])
    check(record["rounds"][-1]["bytes"] == 0, record["rounds"])


def test_signal():
    """signal cancels and leaves the source running"""
    path = folder / "signal.json"
    with devices("64K", "64K") as pair, in_precopy("--json", path, *pair) as process:
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    check(process.returncode == 130, f"exit code {process.returncode}: {said}")
    record = json.loads(path.read_text())
    check(way(record, "source")[-1] == "RUNNING", way(record, "source"))


def test_slow():
    """migration waits for a slow device"""
    with devices("1M", "1M") as pair:
        (DEVICES / pair[0] / "knobs/save_delay_us").write_text("20000")
        record = migrate(*pair)
    check(record["outcome"] == "completed", record["error"])
    clean(record)


def test_converge():
    """migration of a device that dirties pages ends at the limit of rounds"""
    with devices("1M", "1M") as pair:
        record = migrate(
            *("--knob", "dirty_rate=100000000", "--knob", "save_rate=10000000"),
            *("--downtime-limit", "1", "--max-rounds", "4"),
            *pair,
        )
        for name in ("dirty_rate", "save_rate"):
            text = (DEVICES / pair[0] / "knobs" / name).read_text()
            check(text == "0\n", f"{name} is {text}")
    check(record["outcome"] == "completed", record["error"])
    check(len(record["rounds"]) == 4, record["rounds"])
    check(all(each["left_bytes"] > 0 for each in record["rounds"]), record["rounds"])
    clean(record)


def test_faults():
    """failure of each device is reported, and the source continues to run"""
    for knob, said in (
        ("faults=read after=65536 times=-1 errno=EIO", "source: read()"),
        ("faults=seal errno=ENOSPC", "No space left"),
        ("target:faults=write after=100000 errno=ENOSPC", "target: write()"),
        ("target:faults=arc RESUMING->STOP errno=ENOMEM", "Cannot allocate memory"),
    ):
        with devices("1M", "1M") as pair:
            record = migrate("--knob", knob, *pair, code=1)
            check((DEVICES / pair[0] / "knobs/faults").read_text() == "off\n", "not restored")
        check(said in record["error"], record["error"])
        check(way(record, "source")[-1] == "RUNNING", way(record, "source"))


def test_ignore():
    """what is to be ignored is not compared"""
    with devices("64K", "64K") as pair:
        record = migrate(
            "--set", f"{CACHE_LINE_SIZE}=1", "--ignore", f"{CACHE_LINE_SIZE}+4", *pair
        )
    check(record["outcome"] == "completed", record["error"])
    check(compared(record)["config"] == 256 - 4, record["compared"])


def test_differ():
    """different devices are reported"""
    with devices("64K", "64K") as pair:
        record = migrate("--set", f"{CACHE_LINE_SIZE}=1", *pair, code=4)
    check(record["outcome"] == "failed", record["outcome"])
    check("config has 1 different bytes, the first at 0xc" in record["error"], record)
    check(compared(record).keys() == {"bar0", "bar2"}, record["compared"])


def test_no_verify():
    """--no-verify compares nothing"""
    with devices("64K", "64K") as pair:
        record = migrate("--no-verify", *pair)
    check(record["compared"] == [], record["compared"])


def test_sizes():
    """error names the target of another size, which refuses the stream"""
    with devices("64K", "1M") as pair:
        record = migrate(*pair, code=1)
    check(record["error"].startswith("target: write()"), record["error"])
    check("Invalid argument" in record["error"], record["error"])
    check(way(record, "source")[-1] == "RUNNING", way(record, "source"))
    check(way(record, "target")[-1] == "RUNNING", way(record, "target"))


def test_bad_input():
    """invalid arguments fail with an exit code and a message"""
    missing = str(uuid.uuid4())
    with devices("64K", "64K") as (source, target):
        refused(2, ["Usage"])
        refused(2, ["Usage"], source)
        refused(2, ["must not be 0"], source, target, "--bandwidth", "0")
        refused(2, ["the same device"], source, source)
        refused(2, ["the same device"], source, str(DEVICES / source))
        refused(2, ["no bar1, only bar0, bar2"], source, target, "--load", "bar1")
        refused(2, ["no register at"], source, target, "--set", "bar0:0x3ffe=1")
        refused(2, ["knobs/none"], source, target, "--knob", "none=1")
        refused(2, ["dirty_span=1M", "Invalid"], source, target, "--knob", "dirty_span=1M")
        refused(3, ["no device", missing], source, missing)
        refused(3, ["no device /nowhere/else"], "/nowhere/else", target)
        refused(3, ["not bound to a VFIO driver"], source, "/sys/class/net/lo")
        refused(5, ["/nowhere/else"], source, target, "--json", "/nowhere/else")
        refused(5, ["/nowhere/else"], source, target, "--svg", "/nowhere/else")


def test_busy():
    """device that is already open is reported"""
    with devices("64K", "64K", "64K") as (first, second, third), in_precopy(first, second):
        refused(3, [second, "busy"], "--backend", "group", third, second)
        refused(3, [second, "already open"], "--backend", "iommufd", third, second)


def test_minimal():
    """vfio_minimal migrates"""
    with loaded("vfio_minimal"), devices("64K", "64K", parent="vfio_minimal") as pair:
        record = migrate("--fill", "bar0", *pair)
    check(compared(record)["bar0"] == 1 << 16, record["compared"])
    clean(record)


def test_fw():
    """vfio_fw, with slow firmware, migrates"""
    with loaded("vfio_fw"), devices("64K", "64K", parent="vfio_fw") as pair:
        for device in pair:
            (DEVICES / device / "delay_ms").write_text("20")
        record = migrate("--fill", "bar0", *pair)
    check(compared(record)["bar0"] == 1 << 16, record["compared"])
    clean(record)


def test_flags():
    """devices without PRE_COPY or P2P migrate without these states"""
    for flags, states in (
        (1, ["STOP_COPY", "STOP"]),
        (3, ["RUNNING_P2P", "STOP_COPY", "STOP"]),
        (5, ["PRE_COPY", "STOP_COPY", "STOP"]),
    ):
        shape = loaded("vfio_mock", f"migration_flags={flags}")
        with shape, devices("64K", "64K") as pair:
            record = migrate("--fill", "bar2", *pair)
        clean(record)
        check(way(record, "source") == states, (flags, record["states"]))
        check(compared(record)["bar2"] == 1 << 16, record["compared"])


def main():
    """Runs the given tests, or all."""
    global program, top
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    program, top = sys.argv[1], Path(sys.argv[2])
    tests = {n[5:]: f for n, f in globals().items() if n.startswith("test_")}
    names = sys.argv[3:] or list(tests)
    print(f"TAP version 13\n1..{len(names)}", flush=True)
    failed = 0
    for number, name in enumerate(names, 1):
        start = time.monotonic()
        needs = contextlib.nullcontext() if name == "flags" else loaded("vfio_mock")
        verdict = "ok"
        try:
            with needs:
                tests[name]()
        except Exception as error:  # noqa: BLE001, a test may fail in any way
            verdict, failed = "not ok", 1
            for line in f"{type(error).__name__}: {error}".splitlines():
                print(f"# {line}")
        print(f"{verdict} {number} - {name}: {tests[name].__doc__}")
        print(f"# {time.monotonic() - start:.1f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
