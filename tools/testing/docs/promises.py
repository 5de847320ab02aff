#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Compare the table of promises in README.md with the tests.

promises.py TOP

A list below the table names the test that shows each promise. The test must
exist. If it runs on mtty as well, the table must have "yes" for mtty exactly when
mtty_expected.txt does not list it. Prints TAP.
"""

import re
import sys
from pathlib import Path

top = Path(sys.argv[1])
suite = top / "tools/testing/selftests/vfio_migration"
TEST = re.compile(r"^TEST_F(?:_TIMEOUT)?\(\s*(\w+),\s*(\w+)", re.MULTILINE)
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|", re.MULTILINE)
EVIDENCE = re.compile(r"^(\d+)\. `(\w+\.\w+)`", re.MULTILINE)


def judge(row, evidence, tests, fails):
    """Return what is wrong with a row, if anything."""
    number, _, ours, mtty = row
    test = evidence.get(number)
    if test is None:
        return "no test is listed for it"
    if test not in tests:
        return f"test {test} does not exist"
    if not re.fullmatch(r"yes(\[\^\w+\])?", ours):
        return f"{test} passes on vfio_mock, which has {ours!r}"
    fixture, name = test.split(".")
    # The other fixtures are for vfio_mock only.
    if fixture == "device" and (mtty == "yes") == (name in fails):
        return f"mtty_expected.txt disagrees about {test}: {mtty!r}"
    return None


def main():
    """Compare."""
    tests = {".".join(found) for file in suite.rglob("*.c")
             for found in TEST.findall(file.read_text(encoding="utf-8"))}
    fails = set(re.findall(r"^  (\w+)$", (suite / "mtty_expected.txt")
                           .read_text(encoding="utf-8"), re.MULTILINE))
    readme = (top / "README.md").read_text(encoding="utf-8")
    rows, evidence = ROW.findall(readme), dict(EVIDENCE.findall(readme))
    if not rows:
        sys.exit("README.md has no table of promises")
    print("TAP version 13")
    print(f"1..{len(rows)}")
    failed = False
    for number, row in enumerate(rows, 1):
        problem = judge(row, evidence, tests, fails)
        if problem:
            print(f"# {problem}")
            failed = True
        print(f"{'not ' if problem else ''}ok {number} - {row[1]}")
    sys.exit(failed)


main()
