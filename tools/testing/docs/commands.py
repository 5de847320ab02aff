#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Run the commands in reStructuredText documents.

    commands.py host|vm|quotes TOP KSRC DOCUMENT...

A literal block whose first line has a prompt is a block of commands: "$ " for
those of a user on the host, in the folder TOP, and "# " for those of root in the
test machine. The lines between a command and the next prompt must be its output.
White space does not matter, and ... stands for anything. The blocks of a document
run in one shell in their order. Two comments control this:

    .. setup: COMMAND     runs before the blocks that follow
    .. run: no, REASON    the next block is not run

With `quotes` instead of a place, blocks of code are checked: a comment
`.. from: FILE` names their source, in TOP or, with the prefix linux/, in KSRC. The
source must contain them verbatim; a line ... is a gap. Blocks of the language diff
are for steps.py; other blocks that are not commands have the language none.
Prints TAP, a test for each block.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MARK = "@@ end of command, status"
# Functions for the shell of each place.
PRELUDE = {
    "host": "",
    # The modules are not installed; mock creates a device and prints its path.
    "vm": """
modprobe()
{
	if [ -e "$TOP/$1.ko" ]; then insmod "$TOP/$1.ko" "${@:2}"; else command modprobe "$@"; fi
}
cleanup()
{
	local device

	for device in /sys/bus/mdev/devices/*; do
		[ ! -e $device ] || echo 1 >$device/remove
	done
	[ ! -d /sys/module/vfio_mock ] || rmmod vfio_mock
}
trap cleanup EXIT
mock()
{
	local uuid=$(cat /proc/sys/kernel/random/uuid)

	[ -d /sys/module/vfio_mock ] || modprobe vfio_mock
	echo $uuid >/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-$1/create
	echo /sys/bus/mdev/devices/$uuid
}
""",
}
PROMPT = {"$ ": "host", "# ": "vm"}


class Block(NamedTuple):
    """A block of commands, each with its expected output."""

    line: int
    place: str
    commands: list
    setup: list
    skip: str | None
    source: str | None = None


class Wrong(Exception):
    """Error in a document."""


def literal_blocks(text):
    """Yields (line, language, lines, comments) of all literal blocks."""
    lines = text.split("\n")
    comments, at = [], 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if found := re.match(r"\s*\.\. (run|setup|from|step): (.*)", line):
            comments.append(found.groups())
            continue
        directive = re.match(r"(\s*)\.\. code-block::\s*(\S*)$", line)
        if not directive and not re.search(r"::$", line):
            continue
        if not directive and re.match(r"\s*\.\. ", line):
            continue
        indent = len(line) - len(line.lstrip())
        body, first = [], None
        while at < len(lines):
            inner = lines[at]
            if inner.strip() and len(inner) - len(inner.lstrip()) <= indent:
                break
            if inner.strip() and first is None:
                first = at + 1
            body.append(inner)
            at += 1
        kept = [inner for inner in body if inner.strip()]
        if not kept:
            continue
        margin = min(len(inner) - len(inner.lstrip()) for inner in kept)
        body = [inner[margin:] for inner in body]
        yield first, directive[2] if directive else "", body, comments
        comments = []


def blocks(path):
    """Returns all blocks of commands and quotations of a document."""
    result = []
    for line, language, body, comments in literal_blocks(path.read_text()):
        kept = [text for text in body if text.strip()]
        place = PROMPT.get(kept[0][:2])
        if place is None:
            if not language:
                raise Wrong(f"{path}:{line}: block without a language")
            if language not in ("none", "diff"):
                sources = [text for kind, text in comments if kind == "from"]
                if not sources:
                    raise Wrong(f"{path}:{line}: code without a source")
                result.append(Block(line, "quotes", kept, [], None, sources[-1]))
            continue
        commands = []
        for text in kept:
            if commands and commands[-1][0].endswith("\\"):
                commands[-1][0] += "\n" + text
            elif PROMPT.get(text[:2]) == place:
                commands.append([text[2:], []])
            else:
                commands[-1][1].append(text)
        skips = [text for kind, text in comments if kind == "run"]
        skip = skips[-1].removeprefix("no, ") if skips else None
        setup = [text for kind, text in comments if kind == "setup"]
        result.append(Block(line, place, commands, setup, skip))
    return result


def script(place, top, source, document):
    """Returns the blocks of a document as a script, with a mark after each command."""
    text = f"TOP={top}\n{PRELUDE[place]}"
    for block in document:
        text += "".join(f"{line} || exit\n" for line in block.setup)
        if block.skip is None:
            for command, _ in block.commands:
                command = command.replace("/path/to/linux", source)
                # One printf, because $? is the status of the last command.
                text += f"{command}\nprintf '\\n{MARK} %s\\n' $?\n"
    return text


def as_pattern(expected):
    """Returns a pattern for output, in which ... stands for anything."""
    words = " ".join(" ".join(expected).split())
    return ".*".join(re.escape(part) for part in words.split("..."))


def run(place, top, source, path):
    """Runs a document; yields each block with its error, if any."""
    document = [block for block in blocks(path) if block.place == place]
    if place == "quotes":
        yield from ((block, missing(block, top, source)) for block in document)
        return
    if not document:
        return
    # Not from standard input, because a command may read it.
    done = subprocess.run(
        ["bash", "-c", script(place, top, source, document)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=top,
        check=False,
    )
    outputs = re.split(rf"\n?{MARK} (\d+)\n", done.stdout)
    results = list(zip(outputs[::2], outputs[1::2], strict=False))
    for block in document:
        wrong = []
        for command, expected in block.commands if block.skip is None else ():
            output, status = results.pop(0) if results else (outputs[-1], "none")
            said = " ".join(output.split())
            if status != "0":
                wrong.append(f"{command}: status {status}: {output.strip()}")
            elif expected and not re.fullmatch(as_pattern(expected), said):
                wrong.append(f"{command}: unexpected output: {output.strip()}")
        yield block, "\n".join(wrong)


def missing(block, top, source):
    """Returns an error if the source of a quotation does not contain it."""
    name = block.source
    path = top / name
    if name.startswith("linux/"):
        path = Path(source) / name.removeprefix("linux/")
    text = [" ".join(line.split()) for line in path.read_text().split("\n")]
    text = [line for line in text if line]
    pieces, at = [[]], 0
    for line in block.commands:
        line = " ".join(line.split())
        if line == "...":
            pieces.append([])
        else:
            pieces[-1].append(line)
    for piece in pieces:
        places = range(at, len(text) - len(piece) + 1)
        found = next((n for n in places if text[n : n + len(piece)] == piece), None)
        if found is None:
            return f"{name} does not contain:\n" + "\n".join(piece)
        at = found + len(piece)
    return ""


def main():
    """Runs the documents."""
    if len(sys.argv) < 5 or sys.argv[1] not in (*PRELUDE, "quotes"):
        sys.exit(__doc__)
    place, top, source = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3]
    if place == "vm" and not Path("/run/vfio-pipes").is_dir():
        sys.exit("commands.py: these commands are for the test machine only")
    paths = [Path(p).resolve() for p in sys.argv[4:]]
    try:
        planned = sum(b.place == place for p in paths for b in blocks(p))
    except Wrong as error:
        print(f"TAP version 13\n1..1\nnot ok 1 - {error}")
        return 1
    print(f"TAP version 13\n1..{planned}")
    number = failed = 0
    for path in paths:
        for block, wrong in run(place, top, source, path):
            number += 1
            first = block.source or block.commands[0][0]
            name = f"{number} - {path.name}:{block.line}: {first}"
            name = name.split("\n", maxsplit=1)[0].replace("#", "")
            if block.skip is not None:
                print(f"ok {name} # SKIP {block.skip}")
            elif wrong:
                failed = 1
                print("".join(f"# {line}\n" for line in wrong.split("\n")), end="")
                print(f"not ok {name}")
            else:
                print(f"ok {name}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
