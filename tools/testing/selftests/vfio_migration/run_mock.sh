#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Run the tests on vfio_mock: as root, with the VFIO modules loaded. Makes the
# mediated devices that the tests need, removes them, and prints KTAP in which
# each test program is a subtest. The generic tests run on vfio_minimal as well,
# and on the driver on the front page of the crate if it was built.
#
#     run_mock.sh [-b DIR] [-m FILE] [--shapes [--whole]] [option of the tests...]
#
# -b DIR     where the test programs are; by default beside this script
# -m FILE    the module; by default vfio_mock.ko at the top of the repository;
#            vfio_minimal.ko and vfio_note.ko are beside it
# --shapes   all four migration_flags, one after the other, instead of those the
#            module is loaded with
# --whole    the largest devices and the exhaustive damage to streams for each of
#            them, instead of for the last one
#
# VFIO_MIGRATION_ROUNDS=N makes the tests that repeat something do it N times as
# often. Options of the tests are those of kselftest_harness.h: "-t NAME".

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
programs=$here
module=$here/../../../../vfio_mock.ko
shapes=
extent=brief
while :; do
	case ${1-} in
	-b) programs=$2; shift 2 ;;
	-m) module=$2; shift 2 ;;
	--shapes) shapes='1 3 5 7'; shift ;;
	--whole) extent=whole; shift ;;
	*) break ;;
	esac
done

# The streams do not depend on the shape: it is enough to damage every byte once.
exhaustive='every_truncation every_flipped_header_byte flipped_page_bytes
	every_malformation_in_small_chunks'
devices=()
failed=0
number=0

say()
{
	echo "run_mock.sh: $*" >&2
}

cleanup()
{
	local uuid

	for uuid in "${devices[@]}"; do
		echo 1 >"/sys/bus/mdev/devices/$uuid/remove"
	done
	devices=()
}
trap cleanup EXIT

# Load the module with the migration flags $1, or as it is when there are none.
load()
{
	if [ -n "$1" ] && [ -d /sys/module/vfio_mock ]; then
		rmmod vfio_mock || return
	fi
	[ -d /sys/module/vfio_mock ] || insmod "$module" ${1:+migration_flags="$1"}
}

# Two devices of type $2 of the driver $1; $pair is their paths.
create_pair()
{
	local uuid

	pair=
	for _ in 1 2; do
		read -r uuid </proc/sys/kernel/random/uuid
		echo "$uuid" >"/sys/class/mdev_bus/$1/mdev_supported_types/$1-$2/create" ||
			return
		devices+=("$uuid")
		pair+=" /sys/bus/mdev/devices/$uuid"
	done
	pair=${pair# }
}

# Two devices of each size, named to the tests by the environment.
create()
{
	local size pair

	for size in 64K 1M 16M; do
		create_pair vfio_mock $size || return
		export "VFIO_MOCK_$size=$pair"
	done
	export VFIO_DEVICE="${VFIO_MOCK_64K% *}" VFIO_DEVICE2="${VFIO_MOCK_64K#* }"
	export VFIO_DEVICE_OTHER="${VFIO_MOCK_1M% *}"
	# All of BAR2, which is the state memory; no register changes by being read.
	export VFIO_SCRATCH=2:0:0x10000 VFIO_READ_REGIONS=1
}

# One test program as a subtest; the arguments are its own.
run()
{
	local name=$1 start=$SECONDS status

	shift
	number=$((number + 1))
	"$programs/$name" "$@" 2>&1 | sed -u 's/^/  /'
	status=${PIPESTATUS[0]}
	echo "# $name: $((SECONDS - start)) s"
	if [ "$status" = 0 ]; then
		echo "ok $number - $name$label"
	else
		echo "not ok $number - $name$label"
		failed=1
	fi
}

# All programs on the module as it is loaded; $1 is brief or whole.
run_all()
{
	local brief_mock=() brief_stream=() test

	if [ "$1" = brief ]; then
		brief_mock=(-V iommufd_16M)
		for test in $exhaustive; do
			brief_stream+=(-T "$test")
		done
	fi
	shift
	run vfio_migration_test "$@"
	run vfio_mock_test "${brief_mock[@]}" "$@"
	run vfio_mock_irq_test "$@"
	run vfio_mock_stream_test "${brief_stream[@]}" "$@"
	run vfio_mock_fail_test "$@"
}

# The generic tests on devices of type $3 of the driver $2 in the module $1, which
# have the memory $4 to write to.
run_other()
{
	local name=$1 driver=$2 type=$3 scratch=$4 label=" on $1" pair other

	shift 4
	if { [ -d "/sys/module/$name" ] || insmod "${module%/*}/$name.ko"; } &&
		create_pair vfio_mock 64K && other=${pair% *} &&
		create_pair "$driver" "$type"; then
		VFIO_DEVICE="${pair% *}" VFIO_DEVICE2="${pair#* }" \
			VFIO_DEVICE_OTHER=$other VFIO_SCRATCH=$scratch \
			VFIO_READ_REGIONS=1 run vfio_migration_test "$@"
	else
		number=$((number + 1))
		echo "not ok $number - vfio_migration_test$label"
		failed=1
	fi
}

# All other devices of this repository.
run_others()
{
	# All of BAR0 but its two registers.
	run_other vfio_minimal vfio_minimal 64K 0:16:0xfff0 "$@"
	if [ -e "${module%/*}/vfio_note.ko" ]; then
		run_other vfio_note note 16 0:0:16 "$@"
	else
		number=$((number + 1))
		echo "ok $number - vfio_migration_test on vfio_note # SKIP not built"
	fi
}

for program in vfio_migration_test vfio_mock_test vfio_mock_irq_test \
	vfio_mock_stream_test vfio_mock_fail_test; do
	if [ ! -x "$programs/$program" ]; then
		say "$programs/$program: build it, or name its folder with -b"
		exit 1
	fi
done

echo 'TAP version 13'
if [ -z "$shapes" ]; then
	echo '1..7'
	label=
	if load '' && create; then
		run_all whole "$@"
		run_others "$@"
	else
		echo 'Bail out! no devices'
		exit 1
	fi
	exit $failed
fi

echo '1..22'
for shape in $shapes; do
	label=" migration_flags=$shape"
	if ! { load "$shape" && create; }; then
		echo "Bail out! no devices with migration_flags=$shape"
		exit 1
	fi
	if [ "$shape" = 7 ]; then
		run_all whole "$@"
	else
		run_all "$extent" "$@"
	fi
	cleanup
done
run_others "$@"
exit $failed
