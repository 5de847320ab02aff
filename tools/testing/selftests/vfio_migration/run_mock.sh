#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run the tests on vfio_mock: as root, with the VFIO modules loaded. Creates and
# removes the mediated devices for the tests, and prints KTAP with a subtest for
# each test program. The generic tests also run on vfio_minimal, and on vfio_fw and
# the driver on the front page of the crate if they were built.
#
#     run_mock.sh [-b DIR] [-m FILE] [--shapes [--whole] | --functions] [--brief]
#                 [--only PROGRAM] [option of the tests...]
#
# -b DIR     the directory of the test programs; by default that of this script
# -m FILE    the module; by default vfio_mock.ko at the top of the repository;
#            vfio_minimal.ko, vfio_fw.ko, vfio_note.ko and vfio_odd.ko are in the same
#            directory
# --shapes   all four migration_flags, one after the other, instead of the current
#            ones
# --whole    all programs, the largest devices and the exhaustive damage to streams
#            for each of them, instead of only for the last one
# --brief    without the largest devices and the exhaustive damage to streams
# --functions
#            PCI functions instead of mediated devices, without the tests that create
#            mediated devices
# --only     only this program, without loading the module again
#
# The options of the tests are those of kselftest_harness.h, such as "-t NAME", and
# those that "PROGRAM --help" prints: --rounds N multiplies the repetitions, --patience N
# the timeouts.

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=mdevs.sh
. "$here/mdevs.sh"
programs=$here
module=$here/../../../../vfio_mock.ko
shapes=
extent=
# Programs for vfio_mock: with each of the migration_flags, or with all of them set.
each=(vfio_migration_test vfio_mock_test vfio_mock_stream_test vfio_mock_verdict_test)
most=(vfio_mock_irq_test vfio_mock_fail_test vfio_mock_dma_test vfio_mock_mmap_test)
once=(vfio_mock_knobs_test vfio_mock_log_test vfio_mock_work_test vfio_odd_test
	vfio_fw_test vfio_mock_stress vfio_mock_fuzz_test)
# Programs that unload it, which run without other devices.
last=(vfio_mock_life_test vfio_mock_module_test)
# The number of results for the other devices.
others=3
only=
while :; do
	case ${1-} in
	-b) programs=$2; shift 2 ;;
	-m) module=$2; shift 2 ;;
	--shapes) shapes='1 3 5 7'; shift ;;
	--whole | --brief) extent=${1#--}; shift ;;
	--functions) functions=1; shift ;;
	--only) only=$2; shift 2 ;;
	*) break ;;
	esac
done

# The streams do not depend on migration_flags: damage every byte only once.
exhaustive='every_truncation every_flipped_header_byte flipped_page_bytes
	every_malformation_in_small_chunks'
failed=0
number=0

say()
{
	echo "run_mock.sh: $*" >&2
}

trap remove_devices EXIT
sizes=(small:2 medium:4 16M:2 1G:1)

# Load the module with the migration flags $1, or keep it if $1 is empty.
load()
{
	if [ -n "$1" ] && [ -d /sys/module/vfio_mock ]; then
		rmmod vfio_mock || return
	fi
	[ -d /sys/module/vfio_mock ] || insmod "$module" ${1:+migration_flags="$1"}
}

# One test program as a subtest, with its arguments.
run()
{
	local name=$1 start=$SECONDS options=("${mock[@]}" --module "$module") status

	shift
	number=$((number + 1))
	[ "$name" != vfio_migration_test ] || options=("${generic[@]}")
	"$programs/$name" "${options[@]}" "$@" 2>&1 | sed -u 's/^/  /'
	status=${PIPESTATUS[0]}
	echo "# $name: $((SECONDS - start)) s"
	if [ "$status" = 0 ]; then
		echo "ok $number - $name$label"
	else
		echo "not ok $number - $name$label"
		failed=1
	fi
}

# All programs on the loaded module; $1 is brief or whole.
run_all()
{
	local extent=$1 program options test

	shift
	for program in "${each[@]}"; do
		options=()
		case $extent:$program in
		brief:vfio_mock_test)
			options=(-V iommufd_16M)
			;;
		brief:vfio_mock_stream_test)
			for test in $exhaustive; do
				options+=(-T "$test")
			done
			;;
		esac
		run "$program" "${options[@]}" "$@"
	done
}

# Programs that do not depend on the parameters of the module.
run_once()
{
	local program

	for program in "${once[@]}"; do
		run "$program" "$@"
	done
}

# Programs that create devices of their own, and load the module again.
run_last()
{
	local program

	remove_devices
	for program in "${last[@]}"; do
		run "$program" "$@"
	done
}

# The generic tests on devices of type $3 of the driver $2 in the module $1, with the
# scratch memory $4.
run_other()
{
	local name=$1 driver=$2 type=$3 scratch=$4 label=" on $1"

	shift 4
	if { [ -d "/sys/module/$name" ] || insmod "${module%/*}/$name.ko"; } &&
		create_other "$driver" "$type" "$scratch"; then
		run vfio_migration_test "$@"
	else
		number=$((number + 1))
		echo "not ok $number - vfio_migration_test$label"
		failed=1
	fi
}

# The same, unless the module was not built.
run_if_built()
{
	if [ -e "${module%/*}/$1.ko" ]; then
		run_other "$@"
	else
		number=$((number + 1))
		echo "ok $number - vfio_migration_test on $1 # SKIP not built"
	fi
}

# All other devices of this repository.
run_others()
{
	run_other vfio_minimal "${minimal[@]}" "$@"
	# These drivers have no functions.
	[ -z "$functions" ] || return
	run_if_built vfio_fw "${firmware[@]}" "$@"
	run_if_built vfio_note note 16 0:0:16 "$@"
}

if [ -n "$functions" ]; then
	# The others map BARs for DMA, create mediated devices or need page faults.
	once=(vfio_mock_iommu_test vfio_mock_knobs_test vfio_mock_log_test)
	last=() others=1
fi
if [ -n "$only" ]; then
	shapes='' each=() most=() others=0
	case " ${last[*]} " in
	*" $only "*) once=() last=("$only") ;;
	*) once=("$only") last=() ;;
	esac
fi
if [ -z "$shapes" ] || [ "$extent" = whole ]; then
	each+=("${most[@]}")
else
	once=("${most[@]}" "${once[@]}")
fi
for program in "${each[@]}" "${once[@]}" "${last[@]}"; do
	if [ ! -x "$programs/$program" ]; then
		say "$programs/$program: build it, or name its folder with -b"
		exit 1
	fi
done

echo 'TAP version 13'
if [ -z "$shapes" ]; then
	echo "1..$((${#each[@]} + ${#once[@]} + ${#last[@]} + others))"
	label=
	if load '' && create_mock "${sizes[@]}"; then
		run_all "${extent:-whole}" "$@"
		run_once "$@"
		run_last "$@"
		[ $others = 0 ] || run_others "$@"
	else
		echo 'Bail out! no devices'
		exit 1
	fi
	exit $failed
fi

read -ra count <<<"$shapes"
echo "1..$((${#count[@]} * ${#each[@]} + ${#once[@]} + ${#last[@]} + others))"
for shape in $shapes; do
	label=" migration_flags=$shape"
	if ! { load "$shape" && create_mock "${sizes[@]}"; }; then
		echo "Bail out! no devices with migration_flags=$shape"
		exit 1
	fi
	if [ "$shape" = 7 ]; then
		run_all whole "$@"
		run_once "$@"
	else
		run_all "${extent:-brief}" "$@"
	fi
	remove_devices
done
label=
run_last "$@"
run_others "$@"
exit $failed
