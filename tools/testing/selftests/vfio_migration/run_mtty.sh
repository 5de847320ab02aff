#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run vfio_migration_test on the kernel's mtty sample: as root, with the VFIO
# modules loaded.
#
#     run_mtty.sh [-b DIR] [option of the test...]
#
# -b DIR     where the program is; by default beside this script
#
# Some tests make mtty oops: see mtty_expected.txt, and tools/testing/mtty, which
# runs each of those in a test machine of its own.

programs=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
if [ "${1-}" = -b ]; then
	programs=$2
	shift 2
fi
devices=()

cleanup()
{
	local uuid

	for uuid in "${devices[@]}"; do
		echo 1 >"/sys/bus/mdev/devices/$uuid/remove"
	done
}
trap cleanup EXIT

# A device with $1 serial ports; $path is its path.
create()
{
	local uuid

	read -r uuid </proc/sys/kernel/random/uuid
	echo "$uuid" >"/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-$1/create" ||
		exit 1
	devices+=("$uuid")
	path=/sys/bus/mdev/devices/$uuid
}

modprobe mtty || exit 1
create 2
export VFIO_DEVICE=$path
create 2
export VFIO_DEVICE2=$path
create 1
export VFIO_DEVICE_OTHER=$path
# The scratch register of the first port.
export VFIO_SCRATCH=0:7:1 VFIO_READ_REGIONS=1
# What waits for a stalled reader waits in vain.
export VFIO_HANG_SECONDS=${VFIO_HANG_SECONDS:-5}
"$programs/vfio_migration_test" "$@"
