#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run vfio_mock_bench: as root, with the VFIO modules loaded. Creates and removes the
# mediated devices for it.
#
#     run_bench.sh [-b DIR] [-m FILE] [argument of vfio_mock_bench...]
#
# -b DIR     the directory of the program; by default that of this script
# -m FILE    the module; by default vfio_mock.ko at the top of the repository

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=mdevs.sh
. "$here/mdevs.sh"
programs=$here
module=$here/../../../../vfio_mock.ko
while :; do
	case ${1-} in
	-b) programs=$2; shift 2 ;;
	-m) module=$2; shift 2 ;;
	*) break ;;
	esac
done
trap remove_devices EXIT

[ -d /sys/module/vfio_mock ] || insmod "$module" || exit 1
for size in 64K 16M 256M 1G; do
	create_devices vfio_mock $size 1 || exit 1
	export "VFIO_MOCK_$size=$paths"
done
# The kernel's own sample is the reference for the arcs.
if modprobe -q mtty; then
	create_devices mtty 1 1 || exit 1
	export VFIO_MTTY=$paths
fi
"$programs/vfio_mock_bench" "$@"
