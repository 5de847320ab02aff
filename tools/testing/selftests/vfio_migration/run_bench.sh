#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run vfio_mock_bench: as root, with the VFIO modules loaded. Makes the mediated
# devices that it needs, and removes them.
#
#     run_bench.sh [-b DIR] [-m FILE] [argument of vfio_mock_bench...]
#
# -b DIR     where the program is; by default beside this script
# -m FILE    the module; by default vfio_mock.ko at the top of the repository

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
programs=$here
module=$here/../../../../vfio_mock.ko
while :; do
	case ${1-} in
	-b) programs=$2; shift 2 ;;
	-m) module=$2; shift 2 ;;
	*) break ;;
	esac
done
devices=()

cleanup()
{
	local uuid

	for uuid in "${devices[@]}"; do
		echo 1 >"/sys/bus/mdev/devices/$uuid/remove"
	done
}
trap cleanup EXIT

# A device of type $2 of the driver $1; $path is its path.
create()
{
	local uuid

	read -r uuid </proc/sys/kernel/random/uuid
	echo "$uuid" >"/sys/class/mdev_bus/$1/mdev_supported_types/$1-$2/create" || exit 1
	devices+=("$uuid")
	path=/sys/bus/mdev/devices/$uuid
}

[ -d /sys/module/vfio_mock ] || insmod "$module" || exit 1
for size in 64K 16M 256M 1G; do
	create vfio_mock $size
	export "VFIO_MOCK_$size=$path"
done
# Without the kernel's own sample there is nothing to hold the arcs against.
if modprobe -q mtty; then
	create mtty 1
	export VFIO_MTTY=$path
fi
"$programs/vfio_mock_bench" "$@"
