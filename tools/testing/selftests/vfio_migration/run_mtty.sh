#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run vfio_migration_test on the kernel's mtty sample: as root, with the VFIO
# modules loaded.
#
#     run_mtty.sh [-b DIR] [-m MODULE] [option of the test...]
#
# -b DIR     the directory of the program; by default that of this script
# -m MODULE  load this mtty.ko; by default that of the running kernel
#
# Some tests make mtty oops: see mtty_expected.txt, and tools/testing/mtty, which
# runs each of those in a test machine of its own.

programs=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=mdevs.sh
. "$programs/mdevs.sh"
if [ "${1-}" = -b ]; then
	programs=$2
	shift 2
fi
if [ "${1-}" = -m ]; then
	# Loads the modules that it needs.
	modprobe mtty && rmmod mtty && insmod "$2" || exit 1
	shift 2
else
	modprobe mtty || exit 1
fi
trap remove_devices EXIT

create_devices mtty 2 2 || exit 1
read -ra pair <<<"$paths"
create_devices mtty 1 1 || exit 1
# The scratch register of the first port. Calls that wait for a stalled reader never end.
"$programs/vfio_migration_test" "${pair[@]}" --other "$paths" --scratch 0:7:1 \
	--read-regions --hang 5 "$@"
