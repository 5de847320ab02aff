#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Check the rules of the verdict: rules.py TOP KSRC

The uAPI has the sentences that rust/vfio/migration/verdict.rs quotes, and the document
has a row for each rule.
"""

import re
import sys
from pathlib import Path

top, ksrc = map(Path, sys.argv[1:])
header = (ksrc / "include/uapi/linux/vfio.h").read_text()
header = " ".join(re.sub(r"\n \* ?", " ", header).split())
document = (top / "Documentation/vfio_verdict.rst").read_text()
documented = re.findall(r"^``(\w+)``  +\w", document.partition("Statistics\n=")[0], re.MULTILINE)
source = (top / "rust/vfio/migration/verdict.rs").read_text()
names, texts = source.partition("pub const fn text")[::2]
names = re.findall(r'^ +Self::\w+ => "(\w+)",$', names, re.MULTILINE)
texts = re.findall(r'"((?:[^"\\]|\\\n)+)"', texts.partition("\n}\n")[0])
texts = [re.sub(r"\\\n *", "", text) for text in texts]

wrong = [f"not in the uAPI: {text}" for text in texts if text not in header]
if documented != names:
    wrong.append(f"documented are {documented} instead of {names}")
if not names or len(texts) != len(names):
    wrong.append(f"{len(names)} names and {len(texts)} sentences")
print(*wrong, sep="\n")
sys.exit(bool(wrong))
