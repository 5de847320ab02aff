#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Write the steps of the tutorial: steps.py DOCUMENT FIRST FOLDER

FIRST is the source of the first step. Each block of the language diff in the
document, after a comment `.. step: N`, changes the previous step into step N; with
`.. step: N from M`, the first block of step N changes step M instead, or an empty file
if M is 0. The steps are written to FOLDER/step1.rs, step2.rs and so on. Lines @@
separate the hunks of a block, which are located by their context; a hunk without
context is added at the end of the file.
"""

import sys
from pathlib import Path

import commands


def changed(source, block):
    """Returns the lines of a source with the changes of a block."""
    at = 0
    for hunk in "\n".join(block).split("\n@@\n"):
        lines = hunk.strip("\n").split("\n")
        before = [line[1:].rstrip() for line in lines if line[:1] != "+"]
        after = [line[1:] for line in lines if line[:1] != "-"]
        if not before:
            source = source + after
            continue
        places = range(at, len(source) - len(before) + 1)
        found = [n for n in places if source[n : n + len(before)] == before]
        if not found:
            sys.exit("the previous step does not contain:\n" + "\n".join(before))
        at = found[0]
        source = source[:at] + after + source[at + len(before) :]
        at += len(after)
    return source


def main():
    """Writes the steps."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    text = Path(sys.argv[1]).read_text()
    first = Path(sys.argv[2]).read_text()
    head = [
        "// SPDX-License-Identifier: GPL-2.0",
        "",
        "//! A step of the tutorial.",
        "",
    ]
    # Step 0 is empty.
    steps = [head, head + first.rstrip("\n").split("\n")]
    for line, language, body, comments in commands.literal_blocks(text):
        if language != "diff":
            continue
        words = next(text for kind, text in comments if kind == "step")
        number, *base = map(int, words.split(" from "))
        if number == len(steps):
            steps.append(steps[base[0] if base else -1])
        elif number != len(steps) - 1:
            sys.exit(f"line {line}: step {number} comes after {len(steps) - 1}")
        steps[-1] = changed(steps[-1], body)
    for number, lines in enumerate(steps[1:], 1):
        path = Path(sys.argv[3]) / f"step{number}.rs"
        path.write_text("\n".join(lines) + "\n")
        print(path.stem)


if __name__ == "__main__":
    main()
