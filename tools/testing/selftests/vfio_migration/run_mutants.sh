#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run tests on broken variants of drivers, in the test machine: run_mutants.sh
# PROGRAMS LOGS PLAN. PLAN has a line for each variant, with fields separated by tabs:
# name, module, and for each program its name and the tests to run. The devices are PCI
# functions if the program soft_pci or vfio_mock_iommu_test is among them. The output goes
# to LOGS/name.log, with "# not run: REASON" for programs that could not be run.
# Called by tools/testing/mutate.

# shellcheck source=mdevs.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/mdevs.sh"
programs=$1
logs=$2
plan=$3
soft_pci=$(dirname -- "${BASH_SOURCE[0]}")/../../soft_pci/guest.py
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config

load()
{
	local driver

	for driver in "${drivers[@]}"; do
		insmod "${module%/*}/$driver.ko" || return
	done
}

create()
{
	devices=()
	case ${drivers[0]} in
	vfio_minimal) create_other "${minimal[@]}" ;;
	vfio_fw) create_other "${firmware[@]}" ;;
	*) create_mock medium:2 small:2 ;;
	esac
}

# The tests $2... of program $1, on one backend and one size.
run()
{
	local program=$1 test options=(-V group -V group_small -V group_medium
		-V iommufd_medium -V iommufd_16M)

	case $program in
	soft_pci)
		# It makes functions of its own.
		remove_devices
		timeout -k 2 200 "$soft_pci" "$programs" "$module" --only "${@:2}"
		return
		;;
	vfio_migration_test) options+=("${generic[@]}") ;;
	# Its variants are separate tests.
	vfio_mock_life_test) options=(--module "$module") ;;
	*) options+=("${mock[@]}" --module "$module") ;;
	esac
	shift
	for test; do
		options+=(-t "$test")
	done
	timeout -k 2 200 "$programs/$program" --hang 4 "${options[@]}"
}

# A shutdown would wait for the removal; a machine without memory ends.
end_machine()
{
	sync
	echo 1 >/proc/sys/vm/panic_on_oom
	tail /dev/zero
}

first=1
while IFS=$'\t' read -r name module rest; do
	log=$logs/$name.log
	echo "# $name" >"$log"
	case $module in
	*/vfio_minimal.ko) drivers=(vfio_minimal vfio_mock) ;;
	*/vfio_fw.ko) drivers=(vfio_fw vfio_mock) ;;
	*) drivers=(vfio_mock) ;;
	esac
	functions=
	case $rest in
	*soft_pci* | *vfio_mock_iommu_test*) functions=1 ;;
	esac
	if ! said=$(load 2>&1); then
		if [ -z "$first" ]; then
			# Something of the last one is left: run this one in a new machine.
			rm -f -- "$log"
			end_machine
		fi
		echo "# not run: $said" >>"$log"
		continue
	fi
	first=
	if ! create >>"$log" 2>&1; then
		echo '# not run: the devices cannot be created' >>"$log"
		continue
	fi
	IFS=$'\t' read -ra commands <<<"$rest"
	for command in "${commands[@]}"; do
		read -ra words <<<"$command"
		# Unloading the module removes the devices.
		[ -e "${generic[0]}" ] || create >>"$log" 2>&1
		run "${words[@]}" >>"$log" 2>&1
		status=$?
		# 1 means that tests failed.
		[ "$status" -le 1 ] ||
			echo "# not run: ${words[0]} ends with status $status" >>"$log"
	done
	# Give up the machine if the devices cannot be removed.
	{ remove_devices; rmmod "${drivers[@]}"; } >>"$log" 2>&1 &
	remover=$!
	for _ in {1..50}; do
		kill -0 "$remover" 2>/dev/null || break
		sleep 0.2
	done
	if kill -0 "$remover" 2>/dev/null; then
		echo '# cannot be removed' >>"$log"
		end_machine
	fi
done <"$plan"
