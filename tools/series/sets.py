# SPDX-License-Identifier: GPL-2.0
"""The sets of the series: which patches there are, in order, and their messages."""

import dataclasses
import re

from patches import (
    LIMIT,
    RUST,
    SUITE,
    TESTS,
    TOP,
    Patch,
    crate,
    diff,
    grow_suite,
    kunit,
    kunit_root,
    sample,
    suite,
)

# Files of the kernel that the patches change.
CHANGED = (
    ".rustfmt.toml",
    "Documentation/driver-api/index.rst",
    "MAINTAINERS",
    "drivers/iommu/iommufd/iova_bitmap.c",
    "drivers/pci/pci-sysfs.c",
    "drivers/vfio/Kconfig",
    "drivers/vfio/Makefile",
    "drivers/vfio/group.c",
    "drivers/vfio/mdev/mdev_core.c",
    "rust/bindgen_parameters",
    "rust/bindings/bindings_helper.h",
    "rust/helpers/helpers.c",
    "rust/kernel/lib.rs",
    "samples/rust/Kconfig",
    "samples/rust/Makefile",
    "samples/vfio-mdev/mtty.c",
    "tools/testing/selftests/Makefile",
    "tools/testing/selftests/vfio/lib/libvfio.c",
    "tools/testing/selftests/vfio/lib/libvfio.mk",
    "tools/testing/selftests/vfio/lib/vfio_pci_driver.c",
)


@dataclasses.dataclass
class Set:
    """Patches that are posted together, on top of other sets."""

    name: str
    needs: tuple
    subject: str
    cover: str
    patches: tuple
    # Lines of code in a patch.
    limit: int = LIMIT


# Changes of other files.

CONSTANT_BEFORE = "const fop_flags_t RUST_CONST_HELPER_FOP_UNSIGNED_OFFSET = FOP_UNSIGNED_OFFSET;"
KCONFIG_BEFORE = 'source "drivers/vfio/pci/Kconfig"'
KCONFIG = """\
config RUST_VFIO_ABSTRACTIONS
	bool "Rust VFIO abstractions"
	depends on RUST && VFIO=y
	depends on EVENTFD && SYSFS && 64BIT
	select NEED_TASKS_RCU
	help
	  This enables the Rust abstractions for VFIO drivers, in
	  particular for their live migration. It is for drivers, and
	  changes nothing without one. The samples in samples/rust use
	  it.

	  If unsure, say N.

"""


def bindings(tree):
    """Headers, and constants and enums that bindgen needs help for."""
    text = (TOP / "rust/bindings/vfio_bindings.h").read_text()
    constants = re.findall(r"^const .*", text, re.MULTILINE)
    helper = "rust/bindings/bindings_helper.h"
    tree.insert(helper, CONSTANT_BEFORE, "\n".join(constants))
    for include in re.findall(r"^#include <linux/.*", text, re.MULTILINE):
        tree.sort_in(helper, include, r"#include <linux/(?!hrtimer_types|acpi|gpu_buddy)")
    kbuild = (TOP / "rust/vfio.mk").read_text()
    enums = re.findall(r"--newtype-enum (\w+) .*\n.*-enum=\1='\\(.*)' ", kbuild)
    for name, encoding in enums:
        tree.insert(
            "rust/bindgen_parameters",
            "--newtype-enum lru_status",
            f"--newtype-enum {name}\n--with-attribute-custom-enum={name}='{encoding}'\n",
            before=True,
        )


def helpers(tree, tracepoints=False):
    """The helpers, with or without those for tracepoints."""
    text = (TOP / "rust/helpers/vfio.c").read_text()
    text = re.sub(r'#include (<linux/module.h>|"vfio.h")\n|\n/\* sparse (.*\n)*', "", text)
    # A module cannot take the lock.
    text = re.sub(r" \*\n \* A module cannot take iommu_probe(.*\n)*? \*/", " */", text)
    for switch, call in ("off", "lock"), ("on", "unlock"):
        text = text.replace(f"lockdep_{switch}()", f"mutex_{call}(&iommu_probe_device_lock)")
    start = text.index("/* The tracepoints")
    if tracepoints:
        text = text.replace('#include "vfio_trace.h"', "#include <trace/events/vfio_migration.h>")
        start = text.index("/* The tracepoints")
        rest = f"#ifdef CONFIG_RUST_VFIO_ABSTRACTIONS\n{text[start:].rstrip()}\n#endif\n"
    else:
        text = text.replace('#include "vfio_trace.h"\n', "")
        start = text.index("/* The tracepoints")
        rest = ""
    text = re.sub(r"\n{3,}", "\n\n", f"{text[:start]}{rest}").rstrip() + "\n"
    tree.write("rust/helpers/vfio.c", text)
    if not tracepoints:
        tree.sort_in("rust/helpers/helpers.c", '#include "vfio.c"', r'#include "[e-z]')
        tree.maintain(RUST, "rust/helpers/vfio.c")


def options(tree):
    """The option of the module, without what later patches select."""
    tree.insert("drivers/vfio/Kconfig", KCONFIG_BEFORE, KCONFIG, before=True)
    tree.insert(
        "rust/kernel/lib.rs",
        "pub mod workqueue;",
        "#[cfg(CONFIG_RUST_VFIO_ABSTRACTIONS)]\npub mod vfio;",
        before=True,
    )
    tree.maintain(RUST, "rust/kernel/vfio.rs", "rust/kernel/vfio/")


def select(*what):
    """Returns a function that adds a dependency to the option."""

    def change(tree):
        after = "	depends on EVENTFD && SYSFS && 64BIT"
        tree.insert("drivers/vfio/Kconfig", after, "\n".join(f"	select {one}" for one in what))

    return change


def iommu_options(tree):
    """What callbacks of an IOMMU need: an option, and a type for CONFIG_CFI."""
    select("IOMMUFD_DRIVER if IOMMUFD")(tree)
    tree.insert(
        "rust/kernel/lib.rs", "#![feature(used_with_arg)]",
        "//\n// To be determined.\n#![feature(cfi_encoding)]",
    )


def trace(tree):
    """The tracepoints."""
    text = (TOP / "rust/helpers/vfio_trace.h").read_text()
    text = re.sub(r"#undef TRACE_INCLUDE_.*\n|#define TRACE_INCLUDE_.*\n", "", text)
    text = text.replace(
        " Each module that the crate is linked into has\n * its own, in a system with the name"
        " of the module.",
        "",
    )
    text = text.replace("VFIO_TRACE_SYSTEM", "vfio_migration")
    text = text.replace("RUST_HELPERS_VFIO_TRACE_H", "_TRACE_VFIO_MIGRATION_H")
    tree.write("include/trace/events/vfio_migration.h", text)
    text = (TOP / "rust/helpers/vfio_trace.c").read_text()
    text = text.replace('"vfio_trace.h"', "<trace/events/vfio_migration.h>")
    text = text.replace(
        "Defines the tracepoints of a module. VFIO_TRACE_SYSTEM is the name of the module.",
        "Defines the tracepoints of drivers in Rust.",
    )
    tree.write("drivers/vfio/rust_trace.c", text)
    tree.insert(
        "drivers/vfio/Makefile",
        "vfio-$(CONFIG_VFIO_DEBUGFS) += debugfs.o",
        "\nobj-$(CONFIG_RUST_VFIO_ABSTRACTIONS) += rust_trace.o",
    )
    helpers(tree, tracepoints=True)
    tree.maintain(RUST, "drivers/vfio/rust_trace.c", "include/trace/events/vfio_migration.h")


def first_files(tree):
    """The start of the library of the suite."""
    grow_suite(tree, ("mig.h", "mig_option.c", "mig_fsm.c"))
    tree.maintain(SUITE, f"{TESTS}/")


def first_tests(tree):
    """Files of the suite with its first tests."""
    grow_suite(tree, ("Makefile", ".gitignore", "config", "settings", "vfio_migration_test.c",
                      "device/states.c"))
    tree.sort_in("tools/testing/selftests/Makefile", "TARGETS += vfio_migration",
                 r"TARGETS \+= [u-z]")


def mock_library(tree):
    """The driver for vfio_mock in the library of the VFIO selftests."""
    diff("libvfio_mock.patch").change(tree)
    path = f"{TESTS}/vfio_mock.h"
    tree.write(path, tree.files.text[path])
    tree.maintain(RUST, "tools/testing/selftests/vfio/lib/drivers/vfio_mock/")


def documents(tree):
    """The document, and the ABI entries."""
    text = (TOP / "Documentation/vfio_mock.rst").read_text()
    # Comments for the tests of the documents.
    text = re.sub(r"^ *\.\. (setup|run): .*\n+", "", text, flags=re.MULTILINE)
    # Sections about programs that are not part of the series.
    text = re.sub(r"(?ms)^(Virtual machine monitors|Speed)\n=+\n.*?(?=^[^\n]+\n=+\n)", "", text)
    text = re.sub(r"(?m)^(.+\n)*.*``make demo.*\n(.+\n)*\n", "", text)
    abi = [f"Documentation/ABI/testing/{fs}-vfio_mock" for fs in ("configfs", "sysfs")]
    for file in abi:
        # The first kernel that can have it is the one after that of the modules.
        entry = (TOP / file).read_text()
        tree.write(file, re.sub(r"(?m)^(KernelVersion:\t)7\.3$", r"\g<1>7.4", entry))
    tree.write("Documentation/driver-api/vfio-mock.rst", text)
    tree.insert("Documentation/driver-api/index.rst", "   vfio", "   vfio-mock")
    tree.maintain(RUST, *abi, "Documentation/driver-api/vfio-mock.rst")


def message_of(name):
    """Returns the message of a patch to files of the kernel."""
    return diff(name).message


def diffs(folder):
    """The patches in a folder, in the order of their names."""
    names = sorted(path.name for path in (TOP / "tools/series" / folder).glob("*.patch"))
    return tuple(diff(f"{folder}/{name}") for name in names)


FIXES = Set(
    "0-fixes",
    (),
    "vfio, mdev, PCI: fixes of rare failures",
    """
Four faults that tests of a migratable device have met. They do not depend
on each other, and each can be applied alone:

- A bitmap of dirty pages that is not mapped as a whole loses dirty pages
  without an error.
- A VFIO group that cannot be created leaks its IOMMU group, with a warning.
- A mediated device that cannot be allocated counts as an instance for ever.
- Two tasks that remove the same PCI device use it after its end, or wait
  for each other.

Each message says how to reproduce the fault.
""",
    diffs("fixes"),
    limit=100,
)

SELFTESTS = Set(
    "1-selftests",
    (),
    "selftests: vfio: test migratable devices",
    """
Seven drivers in the kernel implement the migration uAPI of VFIO, and no
selftest covers any of it. This set fixes the selftests for devices with
BARs smaller than a page, and adds a suite of 99 tests for any migratable
device: its states and the paths between them, the data_fd and its
end-of-stream rules, pre-copy, DMA logging, sessions, errors, and races.
A failing test quotes the promise of include/uapi/linux/vfio.h.

The tests run by group and by cdev, and skip features that a device does
not have. On the sample mtty, 28 of them fail; the fixes of the worst
five defects are a separate set.

The suite has its own small library. It opens mediated devices, returns
errors instead of aborting, and stalls page faults, none of which libvfio
does. Moving what both need to libvfio is work to do with its maintainer.
""",
    (
        diff("libvfio.patch"),
        Patch(
            """selftests: vfio_migration: add states, options and a model

A model of the migration states, written from the text of the uAPI alone,
so that tests can compare a device with it.
""",
            first_files,
        ),
        suite(
            """selftests: vfio_migration: open devices of both backends

Open a VFIO device by its path in sysfs, as a member of a group or with
iommufd, and call the features and ioctls of migration. Errors are
returned and not asserted, because most tests want them.
""",
            "mig_device.c",
        ),
        suite(
            """selftests: vfio_migration: add streams and memory for DMA

Read whole streams from a data_fd and write them, and map memory for DMA.
Operations that are special to a device, such as DMA, come from a table,
or from a shared object that is given as an option.
""",
            "mig_stream.c", "mig_dma.c", "mig_ops.c", "mig_ops.h",
        ),
        suite(
            """selftests: vfio_migration: share and stall data_fds

Use a data_fd from several threads and processes, with page faults that
stall as long as a test wants.
""",
            "mig_share.c",
        ),
        suite(
            """selftests: vfio_migration: call a device from many threads

Make random calls to a device and its data_fd concurrently, from a
generator with a fixed seed.
""",
            "mig_hammer.c",
        ),
        suite(
            """selftests: vfio_migration: quote promises in failures

Macros on top of kselftest_harness.h: a failing check quotes the promise
of the uAPI, a failing step says which one.
""",
            "mig_test.h",
        ),
        suite(
            """selftests: vfio_migration: test the data_fd

Which transitions create one, read(), write() and poll(), wrong arguments,
and shared use.
""",
            "device/data_fd.c",
        ),
        Patch(
            """selftests: vfio_migration: test the states

All transitions between states, including refused ones. From here on, the
program is built.
""",
            first_tests,
        ),
        suite(
            """selftests: vfio_migration: test features

What a device says about itself, and the checks of arguments.
""",
            "device/features.c",
        ),
        suite(
            """selftests: vfio_migration: test pre-copy

VFIO_MIG_GET_PRECOPY_INFO, ENOMSG at a temporary end of the stream, and
pollers that wake up.
""",
            "device/pre_copy.c",
        ),
        suite(
            """selftests: vfio_migration: test loading

Damaged, short and long streams, and what is left after an error.
""",
            "device/resuming.c",
        ),
        suite(
            """selftests: vfio_migration: test sessions

A data_fd after its session, after the last close, and after the removal
of the device.
""",
            "device/sessions.c",
        ),
        suite(
            """selftests: vfio_migration: test concurrency

Random calls from eight threads, and stalled readers and writers, which
must not delay other calls.
""",
            "device/concurrency.c",
        ),
        suite(
            """selftests: vfio_migration: test the content of a device

The content of a region survives a migration, and a reset and a close
clear it.
""",
            "device/content.c",
        ),
        suite(
            """selftests: vfio_migration: test the config space

Its capabilities, and its migration.
""",
            "device/config.c",
        ),
        suite(
            """selftests: vfio_migration: test DMA

For devices with operations: DMA ends before a P2P state, and continues
after it.
""",
            "device/dma.c",
        ),
        suite(
            """selftests: vfio_migration: test interrupts

For devices with operations: no interrupt is lost or repeated by a
migration.
""",
            "device/irq.c",
        ),
        suite(
            """selftests: vfio_migration: test DMA logging

Arguments and order of START, REPORT and STOP, and the log of a device
with operations.
""",
            "device/dma_log.c",
        ),
        suite(
            """selftests: vfio_migration: add a script for mtty

Create mediated devices of the sample mtty and test them.
""",
            "mdevs.sh", "run_mtty.sh",
        ),
    ),
)

MTTY_SET = Set(
    "2-mtty",
    (),
    "vfio/mtty: fix the migration of the sample",
    """
mtty is the only device without hardware on which the migration uAPI can
be tried, and an example for driver authors. These patches fix its worst
defects: three that let a user corrupt or read freed kernel memory or
crash the kernel, one that lets a stalled page fault block other
processes, and one that shows the state of a user to the next one.

Each message says how to reproduce the defect. Tests for them are in the
set "selftests: vfio: test migratable devices".

mtty still does no DMA, has no dirty tracking, and does not implement the
end-of-stream rules of pre-copy.
""",
    diffs("mtty"),
    limit=100,
)

ABSTRACTIONS = Set(
    "3-rust-abstractions",
    (),
    "rust: abstractions for VFIO drivers",
    """
Foundations of the sets for VFIO drivers in Rust: bindings and helpers,
the device, user buffers, a notifier for pollers, and memory that users
map and whose changes are tracked by page.

Their user is the migration engine in the next set.
""",
    (
        Patch(
            """rust: bindings: add the headers of VFIO and of mediated devices

Abstractions for VFIO drivers need struct vfio_device and its operations,
the bus of mediated devices, and anonymous inodes for the file that
carries a device's state in a migration; and constants that bindgen does
not evaluate. With CONFIG_CFI an enum in the prototype of a callback is a
type of its own.
""",
            bindings,
        ),
        Patch(
            """rust: helpers: add helpers for VFIO drivers

Inline functions and macros that bindgen cannot bind.
""",
            helpers,
        ),
        crate(
            """rust: vfio: add the device and user buffers

Device is struct vfio_device, independent of the bus. Its context says
whether a method needs an open device. UserBuf is the buffer of a read() or
write() that may fault at any byte.
""",
            "device", "user", also=options,
        ),
        crate(
            """rust: vfio: add a notifier for the users of a file

Readers and pollers of a data_fd wait for data, or for the end of the
session. Tracked memory notifies them when a page becomes dirty.
""",
            "notifier",
        ),
        crate(
            """rust: vfio: add memory of devices and a dirty map

Memory that a device and its user access at the same time, and a map of
the pages that changed, with two levels: to find the next one takes time
in proportion to the dirty pages.
""",
            "memory", "memory/dirty_map", "memory/prefetch",
        ),
        crate(
            """rust: vfio: map the memory of devices, and track stores

A page is mapped writable only while its changes need no tracking. Before
it is streamed it is unmapped, so the next store faults and marks it. Both
files are one unit: a mapping unmaps what the tracking takes.
""",
            "memory/mapping", "memory/state",
        ),
    ),
)

# KUnit tests of parts that are in later patches than the engine.
LATER_SUITES = ("msix", "table", "config_space")
STREAM_SUITES = ("stream", "dirty_map")

ENGINE = Set(
    "4-vfio-engine",
    ("3-rust-abstractions",),
    "rust: vfio: live migration, with a variant driver",
    """
Each driver of a migratable VFIO device has the same six hundred lines:
the state machine of the migration uAPI, the file for the device state,
the end-of-stream rules of pre-copy, poll, and reset and close at any
time. Most drivers get a part of it wrong: of the drivers in Linux 7.3,
only mlx5 returns ENOMSG and has a poll() that waits, and none keeps user
copies outside of the locks that a reset needs.

The engine implements this once. A driver says how its device stops, saves
and loads. What C cannot do: a driver that compiles has no state machine
to get wrong, cannot use a data_fd after its session, cannot access a
device that is not open, and has no unsafe code.

The engine needs nothing but a struct vfio_device. Its first user is a
variant driver on vfio_pci_core for two devices that every QEMU has. No
hardware is needed to test it. KUnit tests use a device that is not on a
bus.
""",
    (
        crate(
            """rust: vfio: add the states of the migration uAPI

The states of enum vfio_device_mig_state, the flags that choose among
them, and the arcs.
""",
            "migration/fsm",
        ),
        crate(
            """rust: vfio: judge the clients of a migration

Statistics of the client of a device, and the rules of the uAPI that it
broke, such as a read() after ENOMSG that does not poll.
""",
            "migration/verdict",
        ),
        Patch(
            """vfio: add tracepoints for the migration of devices

One for each arc, reset, session, and call on the data_fd. Drivers in Rust
use them.
""",
            trace,
        ),
        crate(
            """rust: vfio: show statistics and verdict in debugfs

Beside the files of vfio core. They cost nothing without
CONFIG_VFIO_DEBUGFS.
""",
            "migration/ledger", "debugfs",
        ),
        crate(
            """rust: vfio: add the traits of a migratable driver

The operations of a device that can be migrated, its saver and its loader,
and a table of the methods that each arc calls. A state that is small can
be copied as a whole by ImageSaver and ImageLoader.
""",
            "migration", "migration/image",
        ),
        crate(
            """rust: vfio: add migration sessions and the data_fd

A session is shared by the engine and the file, which owns nothing else:
it may outlive the device, its parent and the users of the module. No lock
that a state change, a reset or a page fault needs is held across a user
copy. The end of the stream is temporary in pre-copy and permanent in
STOP_COPY.
""",
            "migration/data_file",
        ),
        crate(
            """rust: vfio: add the migration engine

All code that changes the migration state of a device. Each arc commits
or is undone by itself.
""",
            "migration/engine",
        ),
        kunit(
            """rust: vfio: test the engine: add calls of a data_fd

Functions in C that KUnit tests need: a device that is not registered, the
state machine of vfio core, and calls of a file without a descriptor.
""",
            "vfio_kunit_core.c", "vfio_kunit_device.c", "vfio_kunit_device.h",
        ),
        kunit(
            """rust: vfio: test the engine: add a device

It records the calls of the engine, and fails or hangs on request. Also a
model of the states, written from the text of the uAPI.
""",
            "fake.rs", "paths.rs",
        ),
        kunit(
            """rust: vfio: test the engine with KUnit

All arcs, each failure of each operation, and sessions, reset and close at
any time. The state machine of vfio core is compared with the model.
""",
            "engine.rs", "Makefile", absent=LATER_SUITES + STREAM_SUITES,
        ),
        crate(
            """rust: vfio: add positions in regions

The file offset and the vma of a device file, as region and position.
""",
            "region",
        ),
        crate(
            """rust: vfio: add a wait queue

Unlike with CondVar of the kernel crate, a wait can be killable.
""",
            "wait",
        ),
        crate(
            """rust: vfio: pci: record resets of a device

Variant drivers of PCI devices handle each reset once, with the locks that
they need, in the first call of the user after it.
""",
            "pci/resets", also=select("VFIO_PCI_CORE if PCI"),
        ),
        crate(
            """rust: vfio: pci: access BARs and the config space

An access excludes resets and power management, and fails instead of
faulting while memory space is disabled.
""",
            "pci/function",
        ),
        crate(
            """rust: vfio: pci: track stores to memory in a BAR

The same tracking as of the memory of a software device: a store faults
if its page must be marked.
""",
            "pci/mapping", "pci/memory",
        ),
        crate(
            """rust: vfio: pci: add the trait of variant drivers

What a driver says about its devices, and which BARs it traps or tracks.
""",
            "pci",
        ),
        crate(
            """rust: vfio: pci: add devices of variant drivers

What exists from probe to removal, and while the device is open.
""",
            "pci/device",
        ),
        crate(
            """rust: vfio: pci: add the operations for the core

The struct vfio_device_ops of a driver. vfio_pci_core serves all that a
driver does not.
""",
            "pci/vtable",
        ),
        crate(
            """rust: vfio: pci: register variant drivers

The struct pci_driver, and a macro for a module. The prelude has the items
that nearly every driver uses.
""",
            "pci/driver", "prelude",
        ),
        sample(
            """samples: rust: add a variant driver for devices of QEMU

Migrate bochs-display and ivshmem-plain, whose whole state is in their
BARs. The driver tracks stores to their memory by page faults.
""",
            "membar", "samples/rust/vfio_membar.rs",
            what="PCI devices of QEMU whose state is in\n	  their BARs",
        ),
    ),
)

EMULATED = Set(
    "5-emulated",
    ("3-rust-abstractions", "4-vfio-engine"),
    "rust: vfio: emulated devices",
    """
Projects that use live migration of devices, such as virtual machine
monitors and their CI, cannot test it: the hardware is rare, and mtty does
no DMA, no dirty tracking, and has no end-of-stream rules, which cannot be
added to it without a device model that it does not have.

This set adds software devices on top of the migration engine, as mediated
devices or as PCI functions behind a software IOMMU, and three samples: a
template in one file, a device whose state comes from firmware that is
slow and fails, and a mock with up to 1 GiB of memory, DMA, MSI-X and all
rules of the uAPI, which misbehaves on command.
""",
    (
        crate(
            """rust: vfio: log the pages that a device writes to

For DMA logging. The log is charged to the user and bounded.
""",
            "dma/log", "dma/written",
        ),
        crate(
            """rust: vfio: access the memory of users by IOVA

A software device reads and writes memory that its user mapped for DMA.
Transfers are done in pieces, between which they can be killed.
""",
            "dma", "dma/pieces",
        ),
        crate(
            """rust: vfio: emulated: deliver MSI-X interrupts

Masks and pending bits. If an interrupt cannot be delivered for any
reason, it is pending until no reason is left.
""",
            "emulated/irq/msix",
        ),
        crate(
            """rust: vfio: emulated: add interrupts by eventfds

SET_IRQS with all of its arguments.
""",
            "emulated/irq",
        ),
        crate(
            """rust: vfio: emulated: add a configuration space

Of a PCI function with BARs and MSI-X.
""",
            "emulated/config_space",
        ),
        crate(
            """rust: vfio: emulated: stop a device before its state is read

A gate for the work of a device and for accesses to its BARs: when
the device is stopped, none is running and none begins.
""",
            "emulated/gate",
        ),
        crate(
            """rust: vfio: emulated: add the trait of software devices

A driver has a configuration space, reads and writes of BARs, and work
that the device does by itself.
""",
            "emulated", "emulated/function",
        ),
        crate(
            """rust: vfio: emulated: add worker threads and ioctls

The thread does the work of a device, in the cgroup of the user who opened
it.
""",
            "emulated/worker", "emulated/ioctl",
        ),
        crate(
            """rust: vfio: emulated: add devices from creation to removal

All state of a user exists from the first open to the last close, so the
next user sees nothing of it.
""",
            "emulated/device",
        ),
        crate(
            """rust: vfio: emulated: add the operations for the core

The struct vfio_device_ops of software devices.
""",
            "emulated/vtable",
        ),
        crate(
            """rust: vfio: add parameters of modules that are texts

module! supports only numbers. Such a parameter can have the settings with
which devices begin.
""",
            "module_param",
        ),
        crate(
            """rust: vfio: emulated: register devices

With the types that an administrator can create, and their settings, which
are the same for all front ends.
""",
            "emulated/registration", "emulated/driver",
        ),
        crate(
            """rust: vfio: add mediated devices

The first front end: the bus of mediated devices, on which an administrator
creates a device by its type.
""",
            "mdev", also=select("VFIO_MDEV"),
        ),
        crate(
            """rust: vfio: soft_pci: add the table of an IOMMU

A radix tree from pages of an address space to page frames, with dirty
bits.
""",
            "soft_pci/table",
        ),
        crate(
            """rust: vfio: soft_pci: add a host bridge

A bus without hardware, with slots for functions.
""",
            "soft_pci/bridge",
        ),
        crate(
            """rust: vfio: soft_pci: add a software IOMMU

Each function is in a group of its own. DMA goes through the domain that
vfio_iommu_type1 or iommufd attach.
""",
            "soft_pci/iommu", also=iommu_options,
        ),
        crate(
            """rust: vfio: soft_pci: plug functions into the bridge

The bridge, the IOMMU, and the functions that are plugged in.
""",
            "soft_pci/host",
        ),
        crate(
            """rust: vfio: soft_pci: create functions in configfs

A directory for each function, as an administrator creates them.
""",
            "soft_pci/configfs",
        ),
        crate(
            """rust: vfio: add PCI functions of software devices

The second front end. A module chooses one or both; the driver is the same.
""",
            "soft_pci", "soft_pci/driver", "soft_pci/absent",
        ),
        sample(
            """samples: rust: add a minimal migratable VFIO driver

A template for driver authors in one file, with all states of the
migration uAPI and dirty tracking.
""",
            "minimal", "samples/rust/vfio_minimal.rs",
            what="a device that can be live-migrated and\n	  has no hardware: 64 KiB of memory",
        ),
        sample(
            """samples: rust: vfio_fw: simulate a device with firmware

The state of many devices is accessible to their firmware alone, which
saves and loads it in bulk, takes time, and fails. Simulate one. The driver
follows.
""",
            "fw", "samples/rust/vfio_fw/firmware.rs",
        ),
        sample(
            """samples: rust: vfio_fw: add the driver

A template for drivers of devices with firmware. It handles each failure
of the firmware, and waits for it without delaying other tasks.
""",
            "fw", "samples/rust/vfio_fw/vfio_fw.rs", "samples/rust/vfio_fw/Makefile",
            what="a device that can be live-migrated and\n	  has no hardware: memory that simulated"
            " firmware saves and loads",
        ),
        sample(
            """samples: rust: vfio_mock: add the DMA queue

Few projects test live migration of devices, because the hardware is
rare. vfio_mock needs none: it is a PCI function with state memory of
up to 1 GiB, dirty tracking by page, pre-copy with all of its
end-of-stream rules, and registers that make it slow or busy.

The first part of it are the descriptors of its DMA engine and the order
in which it serves them. The last patch builds it.
""",
            "mock", "samples/rust/vfio_mock/queue.rs",
        ),
        sample(
            """samples: rust: vfio_mock: add its registers and DMA engine

The registers in BAR0, and the engine that serves the queue on the worker
of the device.
""",
            "mock", "samples/rust/vfio_mock/registers.rs", "samples/rust/vfio_mock/dma.rs",
        ),
        sample(
            """samples: rust: vfio_mock: add the device

State memory, commands, types, and the configuration space.
""",
            "mock", "samples/rust/vfio_mock/chip.rs", "samples/rust/vfio_mock/device.rs",
        ),
        sample(
            """samples: rust: vfio_mock: add the format of its stream

Records with a digest, and a decoder that refuses damaged ones.
""",
            "mock", "samples/rust/vfio_mock/migration/stream.rs",
        ),
        sample(
            """samples: rust: vfio_mock: add the settings of the host

A device that is slow, busy or dirties memory, as the host sets it.
""",
            "mock", "samples/rust/vfio_mock/knobs.rs", "samples/rust/vfio_mock/knobs/*.rs",
        ),
        sample(
            """samples: rust: vfio_mock: save the state

Turn the state into a stream, page by page.
""",
            "mock", "samples/rust/vfio_mock/migration/save.rs",
        ),
        sample(
            """samples: rust: vfio_mock: load the state

And the operations that the migration engine calls.
""",
            "mock", "samples/rust/vfio_mock/migration/load.rs", "samples/rust/vfio_mock/migration.rs",
        ),
        sample(
            """samples: rust: add a mock migratable VFIO device

The module, as a mediated device and as a PCI function.
""",
            "mock", "samples/rust/vfio_mock/vfio_mock.rs", "samples/rust/vfio_mock/Makefile",
            what="a device that can be live-migrated and\n	  has no hardware: registers,"
            " interrupts, DMA and state memory",
        ),
        Patch(
            """rust: vfio: emulated: test MSI-X, config space and IOMMU with KUnit

The same tables with the build flags of a kernel.
""",
            lambda tree: kunit_root(tree, STREAM_SUITES),
        ),
        Patch(
            """rust: vfio: test dirty map and stream with KUnit

Both are pure functions, and the tests draw random inputs.
""",
            lambda tree: kunit_root(tree, ()),
        ),
        Patch(message_of("libvfio_mock.patch"), mock_library),
        Patch(
            """Documentation: driver-api: describe the mock migratable VFIO device

Describe the registers, the migration and the stream format of
vfio_mock, for its users and for authors of similar drivers, and its
files in sysfs and configfs.
""",
            documents,
        ),
    ),
)

MOCK_TESTS = Set(
    "6-mock-tests",
    ("1-selftests", "3-rust-abstractions", "4-vfio-engine", "5-emulated"),
    "selftests: vfio_migration: test vfio_mock",
    """
Tests of what only vfio_mock has, and of the module kernel::vfio through
it: the stream and its refusal, mappings, DMA and its log, interrupts,
the software IOMMU, lifetimes, injected failures, and a hostile client.
They are the evidence for the rows of the table in its document.
""",
    (
        suite(
            """selftests: vfio_migration: add helpers for vfio_mock

Registers, state memory, config space and commands of the device, and a
copy of the expected content of the memory.
""",
            "mock.h",
        ),
        suite(
            """selftests: vfio_migration: read and write streams of vfio_mock

A strict parser, and a writer of streams that are wrong in a chosen place.
Both are written from the document, independently of the driver.
""",
            "mock_image.c", "mock_image.h",
        ),
        suite(
            """selftests: vfio_migration: add helpers for DMA of vfio_mock

Memory as a target, and a model of the DMA engine.
""",
            "mock_dma.h", "ops/vfio_mock.c",
        ),
        suite(
            """selftests: vfio_migration: inject failures

Each failure point of an operation fails in turn.
""",
            "mock_fail.h",
        ),
        *(
            suite(f"selftests: vfio_migration: {what}\n\n{body}\n", f"{name}.c")
            for name, what, body in (
                ("vfio_mock_test", "test the device vfio_mock",
                 "Registers, memory, commands, and a migration of all of it."),
                ("vfio_mock_stream_test", "test streams that vfio_mock refuses",
                 "A refused stream must not affect the device afterwards."),
                ("vfio_mock_irq_test", "test interrupts of vfio_mock",
                 "Masks, pending bits, every argument of SET_IRQS, and migration."),
                ("vfio_mock_dma_test", "test DMA of vfio_mock",
                 "Transfers and their errors, states without DMA, and migration."),
                ("vfio_mock_log_test", "test the DMA log of vfio_mock",
                 "The log has exactly the written pages."),
                ("vfio_mock_mmap_test", "test mappings of vfio_mock",
                 "Stores reach the device and are tracked page by page."),
                ("vfio_mock_work_test", "test the worker of vfio_mock",
                 "States in which it stops, and the accounting of its resources."),
                ("vfio_mock_iommu_test", "test the IOMMU of vfio_mock",
                 "Translation, faults and dirty tracking of its PCI functions."),
                ("vfio_mock_life_test", "test lifetimes with vfio_mock",
                 "Every kind of file and mapping, while the device is removed."),
                ("vfio_mock_fail_test", "inject failures into vfio_mock",
                 "The first allocation or user copy fails, then the second, and so on."),
                ("vfio_mock_module_test", "inject failures into loading vfio_mock",
                 "And into unloading, and into creating a device."),
                ("vfio_mock_fuzz_test", "add a hostile client of vfio_mock",
                 "Random and invalid arguments from many threads."),
                ("vfio_mock_knobs_test", "test the settings of vfio_mock",
                 "A device that is slow, busy or dirties memory, as the host sets it."),
                ("vfio_mock_verdict_test", "test the verdict on clients",
                 "For each rule, a client that breaks it and one that does not."),
                ("vfio_mock_stress", "stress two vfio_mock",
                 "Devices that write to each other while both migrate."),
                ("vfio_fw_test", "test the device vfio_fw",
                 "Each failure of the firmware leads to the state of the uAPI."),
                ("vfio_odd_test", "test properties of odd devices",
                 "Those that no device of vfio_mock can show. Skipped without them."),
            )
        ),
        suite(
            """selftests: vfio_migration: measure the speed of vfio_mock

Each figure is a ratio to an operation on the same machine.
""",
            "mock_bench.h", "vfio_mock_bench.c",
        ),
        suite(
            """selftests: vfio_migration: measure how the cost of vfio_mock grows

With the size of the state, and with the number of devices.
""",
            "vfio_mock_scale.c",
        ),
        suite(
            """selftests: vfio_migration: add scripts for vfio_mock

Create devices, and run all tests on them.
""",
            "run_mock.sh", "run_bench.sh",
        ),
    ),
)

SETS = (FIXES, SELFTESTS, MTTY_SET, ABSTRACTIONS, ENGINE, EMULATED, MOCK_TESTS)
