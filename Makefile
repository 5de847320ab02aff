# SPDX-License-Identifier: GPL-2.0
#
# Targets of this repository. kbuild reads Kbuild instead of this file: with the
# environment of `make env`, make -C $KDIR M=$PWD works as well.

ifneq ($(KDIR),)
override KDIR := $(abspath $(KDIR))
endif
export KDIR

testing := tools/testing
vm := $(testing)/vm

ifneq ($(V),1)
MAKEFLAGS += --no-print-directory
.SILENT:
endif

all: modules

# M is a folder with drivers of its own, outside of this repository.
folder := $(if $(M),M=$(abspath $(M)))

modules:		## build the modules (the default)
	$(vm)/modules $(folder)

modules_install: modules ## install the modules below INSTALL_MOD_PATH
	$(vm)/modules modules_install

setup:			## install missing tools and check the versions of all tools
	$(vm)/setup

kernel:			## get, configure and build the test kernel
	$(vm)/kernel

kernel-debug:		## the same with KASAN, lockdep and others; takes much longer
	$(vm)/kernel --kernel debug

kernel-strict:		## the same with CFI and without iommufd
	$(vm)/kernel --kernel strict

env:			## print the environment of the builds, for eval "$(make env)"
	$(vm)/env

kdir:			## print the build folder of the kernel
	$(vm)/kernel kdir

# The command is passed in the environment, so that make does not expand its dollars.
vm: export VFIO_VM_COMMAND := $(value CMD)
unexport CMD
vm: modules		## run CMD='...' as root in the test machine
	[ -n "$$VFIO_VM_COMMAND" ] || { echo "Usage: make vm CMD='...'" >&2; exit 2; }
	$(vm)/run $(VMFLAGS) -- bash -c "$$VFIO_VM_COMMAND"

shell: modules		## open a shell in the test machine
	$(vm)/run $(VMFLAGS) --shell

demo:			## migrate a QEMU guest that works with the mock device
	kernel=$$($(vm)/stock choose $(DEMOFLAGS)) && $(vm)/modules $$kernel && \
		$(testing)/qemu/demo $$kernel $(DEMOFLAGS)

test:			## run all tests; the last line is the summary
	$(testing)/run

test-host:		## run the tests that need no kernel
	$(testing)/run host host_fuzz

test-debug:		## run KUnit, the tests of all drivers and the demo on the debug kernel
	$(testing)/run --kernel debug

test-strict:		## run KUnit and kselftests on the kernel with CFI, without iommufd
	$(testing)/run --kernel strict

selftest:		## build the kselftests and run them in the test machine
	$(testing)/run build selftest

selftest-mtty:		## run them on the mtty sample of the kernel and compare the results
	$(testing)/run build mtty mtty_fixed

selftest-kernel:	## run the VFIO selftests of the kernel and compare the results
	$(testing)/run build selftest_kernel_all -- $(KSELFTESTFLAGS)

selftest-mutations:	## check that the kselftests notice each fault in mutations.txt
	$(testing)/run build mutations -- $(ONLY)

test-device:		## run the conformance tests on the devices of DRIVER or M
	[ -n "$(M)$(DRIVER)" ] || { echo "Usage: make test-device M=folder" >&2; exit 2; }
	$(testing)/device/run $(if $(DRIVER),--driver $(DRIVER)) $(if $(TYPE),--type $(TYPE)) \
		$(if $(OPS),--ops $(OPS)) $(abspath $(or $(M),.)) $(VMFLAGS) -- $(TESTFLAGS)

matrix:			## test kernels with other options
	$(testing)/run matrix -- $(MATRIXFLAGS) $(ONLY)

soak:			## run the long tests, some of them on the debug and strict kernels
	$(testing)/run build soak host_fuzz_long miri mtty mtty_fixed \
		selftest_kernel_all mutations matrix fresh_all stock bundle demo_more
	$(testing)/run --kernel debug build fuzz
	$(testing)/run --kernel strict

bench: modules		## measure the speed, print a table, write bench.json
	$(testing)/run bench -- $(BENCHFLAGS)

bench-native:		## measure the parts that need no kernel, write bench_native.json
	$(testing)/run bench_native -- $(BENCHFLAGS)

scale: modules		## measure how the cost grows, write scale.json and scale.svg
	$(testing)/run scale -- $(SCALEFLAGS)

lint: modules		## check format, style and warnings of all sources
	$(testing)/run lint

doc: modules		## write the documentation of the crates to doc-out/
	$(testing)/run doc

htmldocs:		## write Documentation/ as HTML to html-out/
	$(testing)/run htmldocs

bundle:			## write an archive for tests of VMMs, without a kernel build, to bundle-out/
	tools/bundle/make

series:			## write the series for a kernel tree KSRC to series-out/
	tools/series/run $(if $(KSRC),-k $(KSRC)) $(SERIESFLAGS)

rust-analyzer: modules	## write rust-project.json for editors with rust-analyzer
	$(testing)/rust_project/run

clean:			## remove built files, but not the cache
	$(vm)/clean $(folder)

help:			## print this
	sed -n 's/^\([a-z_-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | \
		expand -t 20
	echo
	echo 'KDIR=folder       use this built kernel tree, not the test kernel'
	echo 'M=folder          modules, clean, test-device: drivers in a folder of their own'
	echo 'DRIVER=name       test-device: only this module'
	echo 'TYPE=name         test-device: only mediated devices of this type'
	echo 'OPS=file.c        test-device: how these devices do DMA and raise interrupts'
	echo 'TESTFLAGS="..."   test-device: options of vfio_migration_test'
	echo 'VMFLAGS="..."     options of tools/testing/vm/run'
	echo 'DEMOFLAGS="..."   options of tools/testing/qemu/demo'
	echo 'CH=folder         demo: Cloud Hypervisor for the scenarios ch and ch-faults'
	echo 'KSELFTESTFLAGS=--write  selftest-kernel: update the table of the results'
	echo 'MATRIXFLAGS=--write  matrix: update the table of the results'
	echo 'BENCHFLAGS="..."  options and words of vfio_mock_bench or bench_native'
	echo 'SCALEFLAGS="-r N" number of measurements of a point of vfio_mock_scale'
	echo 'ONLY="name..."    the only mutations for selftest-mutations, kernels for matrix'
	echo 'SERIESFLAGS="..." options of tools/series/run: --compile, --build, --vm'
	echo 'KSRC=folder       source of Linux for series'
	echo 'RUSTC=path        use this rustc, not /usr/bin/rustc'
	echo 'XDG_CACHE_HOME=folder  keep kernel, tools and logs there, not in ~/.cache'
	echo 'V=1               show all output'

.PHONY: all modules modules_install setup kernel kernel-debug kernel-strict env kdir vm shell
.PHONY: demo test test-debug test-strict test-host test-device selftest selftest-mtty
.PHONY: selftest-kernel selftest-mutations matrix soak bench bench-native scale lint doc
.PHONY: htmldocs bundle series rust-analyzer clean help
