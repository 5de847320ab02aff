#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Hold the table of promises in README.md against the tests.

promises.py TOP

Each line must name a test that there is, and what it says about mtty must be what
mtty_expected.txt says about that test, as far as it runs there. Prints TAP.
"""

import re
import sys
from pathlib import Path

top = Path(sys.argv[1])
suite = top / "tools/testing/selftests/vfio_migration"
TEST = re.compile(r"^TEST_F(?:_TIMEOUT)?\(\s*(\w+),\s*(\w+)", re.MULTILINE)
LINE = re.compile(r"^\| (.+?) \| `(\w+\.\w+)` \| (.+?) \| .+ \|$", re.MULTILINE)


def judge(test, mtty, tests, fails):
    """Return what is wrong with a line, if anything."""
    if test not in tests:
        return f"there is no test {test}"
    fixture, name = test.split(".")
    # The other fixtures belong to the mock.
    if fixture == "device" and mtty.startswith("no") != (name in fails):
        return f"mtty_expected.txt says otherwise about {test}: {mtty}"
    return None


def main():
    """Compare."""
    tests = {".".join(found) for file in suite.glob("*_test.c")
             for found in TEST.findall(file.read_text(encoding="utf-8"))}
    fails = set(re.findall(r"^  (\w+)$", (suite / "mtty_expected.txt")
                           .read_text(encoding="utf-8"), re.MULTILINE))
    lines = LINE.findall((top / "README.md").read_text(encoding="utf-8"))
    if not lines:
        sys.exit("README.md has no table of promises")
    problems = [judge(test, mtty, tests, fails) for _, test, mtty in lines]
    print("TAP version 13")
    print(f"1..{len(lines)}")
    for number, ((promise, _, _), problem) in enumerate(zip(lines, problems), 1):
        if problem:
            print(f"# {problem}")
        print(f"{'not ' if problem else ''}ok {number} - {promise}")
    sys.exit(any(problems))


main()
