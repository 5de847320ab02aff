#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run vfio_mock_bench: as root, with the VFIO modules loaded. Creates and removes the
# devices for it.
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
create_mock 64K:1 16M:1 256M:1 1G:1 || exit 1
# The kernel's own sample is the reference for the arcs.
if modprobe -q mtty; then
	create_devices mtty 1 1 || exit 1
	mock+=(--mtty "$paths")
fi
# Not all systems support functions.
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
if [ -d /sys/kernel/config/vfio_mock ]; then
	functions=1
	create_devices vfio_mock 64K 1 || exit 1
	mock+=(--function "$paths")
fi
"$programs/vfio_mock_bench" "${mock[@]}" "$@"
