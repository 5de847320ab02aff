#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Check that Documentation/vfio_vmms.rst has a row for each case of the demo: vmms.py TOP"""

import re
import sys
from pathlib import Path

sys.dont_write_bytecode = True
top = Path(sys.argv[1])
sys.path.append(str(top / "tools/testing/qemu"))
import cases
import cloud_hypervisor

document = (top / "Documentation/vfio_vmms.rst").read_text()
wrong = []
for name, table in (
    ("CASES", cases.CASES),
    ("STEPS", cases.STEPS),
    ("Cloud Hypervisor", cloud_hypervisor.CASES),
):
    played = list(table)
    # The table follows a comment with the name of the table of cases.
    table = document.partition(f"\n.. cases: {name}\n\n.. list-table::\n")[2]
    table = re.match(r"(?: .*\n|\n)*", table)[0]
    rows = re.findall(r"^   \* - ``(\S+)``$", table, re.MULTILINE)
    if rows != played:
        wrong.append(f"{name}: documented are {rows} instead of {played}")
print(*wrong, sep="\n")
sys.exit(bool(wrong))
