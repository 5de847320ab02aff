# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Paths and environment for the scripts of the test machine. To be sourced.

# shellcheck disable=SC2034 # the variables are for the scripts that source this

set -u -o pipefail

# The PATH of the user, which tool_env replaces.
vm_path=${vm_path:-$PATH}
export vm_path

vm_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
vm_top=$(cd -- "$vm_dir/../../.." && pwd -P)
vm_cache=${XDG_CACHE_HOME:-$HOME/.cache}/vfio-rust
vm_logs=$vm_cache/logs
# Results of this copy of the repository, other than the modules.
vm_own=$vm_cache/trees/$(cksum <<<"$vm_top" | cut -d' ' -f1)
vm_src=$vm_cache/src/linux-source-7.3
vm_build=$vm_cache/build
# From `make env`, like no KDIR.
[ "${KDIR:-}" != "$vm_build" ] || unset KDIR
# The options of the test kernel, and those that it must have.
vm_fragments=$vm_top/.config.fragment
vm_required=$vm_fragments
vm_patience=1
vm_suffix=
# Only configure the kernel: modules can be compiled, but not loaded.
vm_prepare=

die()
{
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  %s\n' "$@" >&2
	exit 1
}

# --kernel NAME, as the first option of a script, selects a kernel other than that of
# .config.fragment. Scripts that it calls inherit it.
vm_given=
if [ "${1:-}" = --kernel ]; then
	vm_kernel=${2:?} vm_given=1
	shift 2
fi
export vm_kernel=${vm_kernel:-}
case $vm_kernel in
'') ;;
# With KASAN, lockdep and others: slow.
debug) vm_patience=8 ;;
# One with control-flow integrity and without iommufd.
strict) ;;
# The normal one, but not built.
prepared) vm_prepare=1 ;;
# One with pages of 64 KiB, and the options of the normal one that exist there.
arm64) vm_prepare=1 vm_required=$vm_top/.config.arm64.fragment ;;
# That of the distribution, see stock.
stock) ;;
# With the options that the script matrix chooses: built, or only configured.
matrix) vm_required=$vm_cache/matrix.fragment ;;
matrix-*) vm_prepare=1 vm_required=$vm_cache/matrix.fragment ;;
*) die "--kernel $vm_kernel: unknown kernel" ;;
esac
if [ -n "$vm_kernel" ]; then
	vm_suffix=-$vm_kernel
	vm_build+=$vm_suffix
	case $vm_kernel in
	prepared | stock) ;;
	matrix*) vm_fragments+=" $vm_required" ;;
	*)
		vm_fragments+=" $vm_top/.config.$vm_kernel.fragment"
		[ "$vm_kernel" = arm64 ] || vm_required=$vm_fragments
		;;
	esac
fi

case $vm_top$vm_cache in
*[[:space:],:]*)
	die 'kbuild and QEMU do not accept blanks, commas or colons in these paths:' \
		"$vm_top" "$vm_cache"
	;;
esac

say()
{
	printf '%s\n' "$*" >&2
}

# The build folder of the test kernel, also used to build the modules.
kdir()
{
	printf '%s\n' "${KDIR:-$vm_build}"
}

# The build folder of the kernel for guests in the test machine, which is not under test.
guest_kdir()
{
	local dir=${vm_build%"$vm_suffix"}

	[ "$vm_kernel" != stock ] || dir=$vm_build/guest
	printf '%s\n' "${KDIR:-$dir}"
}

# The folder of the installed kernel modules for the test machine.
modroot()
{
	local name=modroot$vm_suffix

	[ "$(kdir)" = "$vm_build" ] || name+=-$(kdir | cksum | cut -d' ' -f1)
	printf '%s\n' "$vm_cache/$name"
}

# The newest complete LLVM of the distribution that is sufficient for the kernel.
llvm_bin()
{
	local dir found=

	while read -r dir; do
		[ -x "$dir/clang" ] && [ -x "$dir/ld.lld" ] &&
			[ -x "$dir/llvm-ar" ] &&
			compgen -G "${dir%/bin}/lib/libclang-[0-9]*.so*" >/dev/null &&
			found=$dir
	done < <(compgen -G '/usr/lib/llvm-*/bin' | sort -V)
	[ -n "$found" ] && printf '%s\n' "$found"
}

# A fixed PATH avoids other toolchains: a rustc of another version, or without rust-src,
# leads to errors that are hard to understand.
tool_env()
{
	local llvm

	llvm=$(llvm_bin) || llvm=
	RUSTC=${RUSTC:-/usr/bin/rustc}
	PATH=$vm_cache/tools/bin${llvm:+:$llvm}:${RUSTC%/*}:/usr/bin:/bin:/usr/sbin:/sbin
	RUSTDOC=${RUSTC%/*}/rustdoc
	RUSTFMT=${RUSTC%/*}/rustfmt
	LLVM=1
	case $vm_kernel in
	arm64 | matrix-arm64) export ARCH=arm64 ;;
	esac
	# Symbols cannot be resolved without a kernel image.
	[ -z "$vm_prepare" ] || export KBUILD_MODPOST_WARN=1
	[ -z "$llvm" ] || LIBCLANG_PATH=${llvm%/bin}/lib
	[ "${V:-}" != 1 ] || export KBUILD_VERBOSE=1
	# The variables and the job server of the calling make are not for the
	# builds of the scripts.
	unset MAKEFLAGS MFLAGS MAKELEVEL RUSTFLAGS RUSTUP_TOOLCHAIN
	export PATH RUSTC RUSTDOC RUSTFMT LLVM LIBCLANG_PATH
	[ "$vm_kernel" != matrix-gcc ] || unset LLVM
	if [ "$vm_kernel" = stock ]; then
		# The tools that the distribution has built its kernel with.
		PATH=/usr/bin:/bin:/usr/sbin:/sbin
		RUSTC=/usr/bin/rustc
		unset LLVM LIBCLANG_PATH
	fi
}

# The source tree of the kernel in kdir().
ksrc()
{
	local dir

	dir=$(kdir)
	if [ -n "${KDIR:-}" ]; then
		[ ! -e "$dir/source" ] || dir=$(realpath -- "$dir/source")
		printf '%s\n' "$dir"
	else
		printf '%s\n' "$vm_src"
	fi
}

# True if version $1 is at least $2.
at_least()
{
	printf '%s\n%s\n' "$2" "$1" | sort -VC
}

# True if KVM works. /dev/kvm may exist without vmx or svm, but then every guest hangs.
have_kvm()
{
	grep -qwE 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ]
}

# The first version number in the output of a tool.
tool_version()
{
	"$@" 2>/dev/null | grep -oEm1 '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n 1
}

# The prefix to run a command as root, empty for root.
root_prefix()
{
	if [ "$(id -u)" = 0 ]; then
		return
	elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
		echo sudo
	else
		return 1
	fi
}

# A cargo for programs of this machine: that of the user, or of the distribution.
find_cargo()
{
	local cargo

	for cargo in "$(PATH=$vm_path command -v cargo)" "$HOME/.cargo/bin/cargo" \
		/usr/bin/cargo; do
		if [ -x "$cargo" ] && at_least "$(tool_version "$cargo" --version)" 1.70
		then
			printf '%s\n' "$cargo"
			return
		fi
	done
	return 1
}

# Run that cargo in its own environment, not in that of kernel builds.
run_cargo()
{
	local cargo

	cargo=$(find_cargo) || return 1
	env -u RUSTC -u RUSTDOC -u RUSTFLAGS PATH="${cargo%/*}:$vm_path" "$cargo" "$@"
}

# Copy the sources, including uncommitted ones, to a folder, for builds that must not
# change the modules of the normal build.
copy_sources()
{
	mkdir -p "$1" && git -C "$vm_top" ls-files -z -co --exclude-standard |
		rsync -a --files-from=- --from0 --ignore-missing-args "$vm_top/" "$1/"
}

# Set the array pci_machine to the options of `run` for a machine with an IOMMU and the
# named devices of QEMU. Each is below a port of its own, whose bus can be reset. QEMU
# without KVM can abort if several CPUs access the devices while their addresses change.
pci_machine()
{
	local port=0 device

	pci_machine=(-c 1 -a intel_iommu=on -q '-device intel-iommu')
	for device; do
		port=$((port + 1))
		case $device in
		ivshmem-plain*)
			pci_machine+=(-q "-object memory-backend-memfd,id=shm$port,size=1M,share=on")
			device+=,memdev=shm$port
			;;
		esac
		pci_machine+=(-q "-device pcie-root-port,id=port$port,chassis=$port"
			-q "-device $device,bus=port$port")
	done
}

# Add to pci_machine a port of the machine that is the monitor of its QEMU, which can
# write files to the folder $1. qemu/outside.py is for the other end.
pci_monitor()
{
	pci_machine+=(-o "$1" -q '-device virtio-serial-pci,id=outside'
		-q "-chardev socket,id=monitor,path=$1/monitor,server=on,wait=off"
		-q '-mon chardev=monitor,mode=control'
		-q "-chardev socket,id=port,path=$1/monitor"
		-q '-device virtserialport,bus=outside.0,name=vfio.monitor,chardev=port')
}

tap_number=0 tap_failed=0

tap_plan()
{
	tap_number=0 tap_failed=0
	echo 'TAP version 13'
	echo "1..$1"
}

# Print the result of the next test, with its output if it failed.
tap_result()
{
	tap_number=$((tap_number + 1))
	if [ "$1" = 0 ]; then
		echo "ok $tap_number - $2"
	else
		[ -z "${3:-}" ] || printf '%s\n' "# ${3//$'\n'/$'\n# '}"
		echo "not ok $tap_number - $2"
		tap_failed=1
		return 1
	fi
}

# Run a command as a test: tap NAME COMMAND...
tap()
{
	local output status

	output=$("${@:2}" 2>&1 </dev/null)
	status=$?
	tap_result $status "$1" "$output"
}

# Build the kselftests into $vm_own/selftests, all or the named programs.
# shellcheck disable=SC2120 # mostly called without arguments
selftest_build()
{
	local headers output=$vm_own/selftests

	headers=$(kdir)/usr/include
	# Install the headers from the source if the build has none.
	[ -r "$headers/linux/vfio.h" ] && headers="-isystem $headers" || headers=
	mkdir -p "$output" &&
		flock "$vm_own/lock" \
		make -s -C "$vm_top/tools/testing/selftests/vfio_migration" \
			KSRC="$(ksrc)" OUTPUT="$output" \
			${headers:+"KHDR_INCLUDES=$headers"} "$@"
}
