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
vm_cache=${VFIO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vfio-rust}
vm_logs=$vm_cache/logs
# Results of this copy of the repository, other than the modules.
vm_own=$vm_cache/trees/$(cksum <<<"$vm_top" | cut -d' ' -f1)
vm_src=$vm_cache/src/linux-source-7.3
# The test kernel: that of .config.fragment; VFIO_KERNEL=debug selects a slow one with
# checks for faults, VFIO_KERNEL=strict one with control-flow integrity and without
# iommufd.
vm_build=$vm_cache/build
vm_fragments=$vm_top/.config.fragment
vm_patience=1
vm_suffix=

die()
{
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	shift
	[ $# -eq 0 ] || printf '  %s\n' "$@" >&2
	exit 1
}

case ${VFIO_KERNEL:-} in
'') ;;
debug | strict)
	vm_suffix=-$VFIO_KERNEL
	vm_build+=$vm_suffix
	vm_fragments+=" $vm_top/.config.$VFIO_KERNEL.fragment"
	[ "$VFIO_KERNEL" = strict ] || vm_patience=8
	;;
*) die "VFIO_KERNEL=$VFIO_KERNEL: unknown kernel" ;;
esac

case $vm_top$vm_cache in
*[[:space:],:]*)
	die 'kbuild and QEMU do not accept blanks, commas or colons in these paths:' \
		"$vm_top" "$vm_cache"
	;;
esac

say()
{
	[ "${QUIET:-}" = 1 ] || printf '%s\n' "$*" >&2
}

# The build folder of the test kernel, also used to build the modules.
kdir()
{
	printf '%s\n' "${KDIR:-$vm_build}"
}

# The build folder of the kernel for guests in the test machine, which is not under test.
guest_kdir()
{
	printf '%s\n' "${KDIR:-${vm_build%"$vm_suffix"}}"
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
	[ -z "$llvm" ] || LIBCLANG_PATH=${llvm%/bin}/lib
	[ "${V:-}" != 1 ] || export KBUILD_VERBOSE=1
	# The variables and the job server of the calling make are not for the
	# builds of the scripts.
	unset MAKEFLAGS MFLAGS MAKELEVEL RUSTFLAGS RUSTUP_TOOLCHAIN
	export PATH RUSTC RUSTDOC RUSTFMT LLVM LIBCLANG_PATH
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

# True if KVM can run machines. Without these flags /dev/kvm can be opened, but every
# guest hangs.
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

# Build the kselftests into $vm_own/selftests.
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
			${headers:+"KHDR_INCLUDES=$headers"}
}
