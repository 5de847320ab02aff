#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Print the scripts in a workflow file: steps.py FILE

The name and the script of each step, each with a null byte after it.
"""

import sys
from pathlib import Path

from ruamel.yaml import YAML

workflow = YAML(typ="safe").load(Path(sys.argv[1]))
for job in workflow["jobs"].values():
    for step in job["steps"]:
        if "run" in step:
            print(step["name"], step["run"], sep="\0", end="\0")
