#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run tests on broken variants of vfio_mock, in the test machine: run_mutants.sh
# PROGRAMS LOGS. LOGS/plan has a line for each, of fields between tabs: name,
# module, and for each program its name and the tests to run. What they print is
# LOGS/name.log. Called by tools/testing/mutate.

programs=$1
logs=$2
devices=()

# Two devices of size $1; $pair is their paths.
create_pair()
{
	local uuid

	pair=
	for _ in 1 2; do
		read -r uuid </proc/sys/kernel/random/uuid
		echo "$uuid" >"/sys/class/mdev_bus/vfio_mock/mdev_supported_types/vfio_mock-$1/create" ||
			return
		devices+=("$uuid")
		pair+=" /sys/bus/mdev/devices/$uuid"
	done
	pair=${pair# }
}

create()
{
	local pair

	devices=()
	create_pair 1M || return
	export VFIO_MOCK_1M=$pair VFIO_DEVICE_OTHER=${pair% *}
	create_pair 64K || return
	export VFIO_MOCK_64K=$pair VFIO_DEVICE=${pair% *} VFIO_DEVICE2=${pair#* }
	export VFIO_SCRATCH=2:0:0x10000 VFIO_READ_REGIONS=1 VFIO_HANG_SECONDS=4
}

remove()
{
	local uuid

	for uuid in "${devices[@]}"; do
		echo 1 >"/sys/bus/mdev/devices/$uuid/remove"
	done
	rmmod vfio_mock
}

# The tests $2... of program $1, on one backend and one size.
run()
{
	local program=$1 test options=(-V group -V group_64K -V group_1M -V group_16M
		-V iommufd_1M -V iommufd_16M)

	shift
	for test; do
		options+=(-t "$test")
	done
	timeout -k 2 200 "$programs/$program" "${options[@]}"
}

while IFS=$'\t' read -r name module rest; do
	log=$logs/$name.log
	echo "# $name" >"$log"
	{ insmod "$module" && create; } >>"$log" 2>&1 || continue
	IFS=$'\t' read -ra commands <<<"$rest"
	for command in "${commands[@]}"; do
		read -ra words <<<"$command"
		run "${words[@]}" >>"$log" 2>&1
	done
	# What cannot be removed is left behind, with the machine.
	remove >>"$log" 2>&1 &
	remover=$!
	for _ in {1..50}; do
		kill -0 "$remover" 2>/dev/null || break
		sleep 0.2
	done
	if kill -0 "$remover" 2>/dev/null; then
		echo '# cannot be removed' >>"$log"
		sync
		# A shutdown would wait as well; a machine without memory ends.
		echo 1 >/proc/sys/vm/panic_on_oom
		tail /dev/zero
	fi
done <"$logs/plan"
