# SPDX-License-Identifier: GPL-2.0
#
# The verbs of this repository. What is built is in Kbuild, which kbuild reads
# instead of this file: make -C $KDIR M=$PWD LLVM=1 works as well.

export V KDIR
export VFIO_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vfio-rust

vm := tools/testing/vm
selftests := tools/testing/selftests/vfio_migration

ifneq ($(V),1)
MAKEFLAGS += --no-print-directory
.SILENT:
endif

all: modules		## build the modules (default); KDIR=, V=1

modules:
	$(vm)/modules

modules_install:	## install the modules for the kernel of KDIR
	$(vm)/modules modules
	$(vm)/modules modules_install

setup:			## install the tools that are missing, check all versions
	$(vm)/setup

kernel:			## get, configure and build the test kernel
	$(vm)/kernel

kdir:			## print the build folder of the kernel
	$(vm)/kernel kdir

# The command goes through the environment: no quoting of make or shell is lost.
vm: export VFIO_VM_CMD := $(value CMD)
vm: modules		## run CMD='...' as root in the test machine; VMFLAGS=
	[ -n "$$VFIO_VM_CMD" ] || { echo "make vm CMD='command'" >&2; exit 2; }
	$(vm)/run $(VMFLAGS) -- bash -c "$$VFIO_VM_CMD"

shell: modules		## open a shell in the test machine; VMFLAGS=
	$(vm)/run $(VMFLAGS) --shell

demo: modules		## watch a QEMU guest migrate with the mock device
	tools/testing/qemu/demo $(DEMOFLAGS)

test:			## run everything; the last line adds it up
	tools/testing/run $(PARTS)

test-host:		## run the tests that need no kernel
	tools/testing/run host

selftest:		## build the kselftests and run them in the test machine
	tools/testing/run selftest

lint: modules		## check format, style and warnings of all sources
	tools/testing/lint $(LINTS)

doc: modules		## write the documentation of the crates to doc-out/
	tools/testing/doc doc-out

clean:			## remove what was built here; the cache stays
	-[ ! -d "$$($(vm)/kernel kdir)" ] || $(vm)/modules clean
	rm -rf doc-out
	$(MAKE) -s -C $(selftests) clean

help:			## print this
	sed -n 's/^\([a-z_-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | \
		expand -t 18

.PHONY: all modules modules_install setup kernel kdir vm shell demo test
.PHONY: test-host selftest lint doc clean help
