# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Devices for the scripts in this directory: mediated devices, or PCI functions if
# $functions is not empty.
functions=

# The UUIDs of the existing devices, and the directories of functions.
devices=()

# Create a function of type $2 of the driver $1 with the name $3.
create_function()
{
	local directory=/sys/kernel/config/$1/$3

	mkdir "$directory" && devices+=("$directory") && echo "$2" >"$directory/type" &&
		echo 1 >"$directory/power" &&
		paths+=" /sys/bus/pci/devices/$(cat "$directory/address")"
}

# Create $3 devices of type $2 of the driver $1; $paths are their paths.
create_devices()
{
	local uuid i

	paths=
	for ((i = 0; i < $3; i++)); do
		read -r uuid </proc/sys/kernel/random/uuid
		if [ -n "$functions" ]; then
			create_function "$1" "$2" "$uuid" || return
			continue
		fi
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

# Create devices of vfio_mock, NAME:COUNT...: small, medium or a type. $mock has the
# options for the programs for vfio_mock, $generic those for vfio_migration_test.
create_mock()
{
	local name count type bytes small='' medium=''

	mock=()
	while IFS=: read -r name count; do
		case $name in
		small) type=$(type_of_pages 16) && bytes=$(numfmt --from=iec "$type") ;;
		medium) type=$(type_of_pages 256) ;;
		*) type=$name ;;
		esac && create_devices vfio_mock "$type" "$count" || return
		case $name in
		small) small=$paths ;;
		medium) medium=$paths ;;
		esac
		mock+=("--$name" "$paths")
	done < <(printf '%s\n' "$@")
	# All of BAR2, which is the state memory; reads have no side effects.
	# shellcheck disable=SC2034 # for the scripts that source this
	[ -z "$small" ] || generic=("${small% *}" "${small#* }" --other "${medium%% *}"
		--scratch "2:0:$bytes" --drops-writes --read-regions
		--device-ops vfio_mock)
}

# Arguments of create_other. The scratch memory is all of BAR0 except for the two registers
# of vfio_minimal.
# shellcheck disable=SC2034 # for the scripts that source this
minimal=(vfio_minimal 64K 0:16:0xfff0)
# shellcheck disable=SC2034 # for the scripts that source this
firmware=(vfio_fw 64K 0:0:0x10000)

# Create a device of vfio_mock and two of type $2 of the driver $1. $generic has the
# options for vfio_migration_test, with the scratch memory $3.
create_other()
{
	local paths other

	create_devices vfio_mock 64K 1 && other=$paths && create_devices "$1" "$2" 2 || return
	# shellcheck disable=SC2034 # for the scripts that source this
	generic=("${paths% *}" "${paths#* }" --other "$other" --scratch "$3"
		--drops-writes --read-regions)
}

remove_devices()
{
	local uuid

	for uuid in "${devices[@]}"; do
		case $uuid in
		/*) rmdir "$uuid" ;;
		*) echo 1 >"/sys/bus/mdev/devices/$uuid/remove" ;;
		esac
	done
	devices=()
}
