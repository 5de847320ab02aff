# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Mediated devices for the scripts in this directory.

# The UUIDs of the existing devices.
devices=()

# Create $3 devices of type $2 of the driver $1; $paths are their paths.
create_devices()
{
	local uuid i

	paths=
	for ((i = 0; i < $3; i++)); do
		read -r uuid </proc/sys/kernel/random/uuid
		echo "$uuid" >"/sys/class/mdev_bus/$1/mdev_supported_types/$1-$2/create" ||
			return
		devices+=("$uuid")
		paths+=" /sys/bus/mdev/devices/$uuid"
	done
	paths=${paths# }
}

# The smallest type of vfio_mock with at least $1 kernel pages.
type_of_pages()
{
	local type bytes=$(($1 * $(getconf PAGESIZE)))

	for type in 64K 1M 16M 256M 1G; do
		if [ "$(numfmt --from=iec "$type")" -ge "$bytes" ]; then
			echo "$type"
			return
		fi
	done
	return 1
}

remove_devices()
{
	local uuid

	for uuid in "${devices[@]}"; do
		echo 1 >"/sys/bus/mdev/devices/$uuid/remove"
	done
	devices=()
}
