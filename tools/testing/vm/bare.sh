# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# A bare root file system of Debian, for tests with nothing else on the machine. To be
# sourced after lib.sh. Needs root.

# shellcheck disable=SC2034 # bare_skip is for the scripts that source this
# shellcheck disable=SC2154 # the others are from lib.sh

# shellcheck source=/dev/null
. /etc/os-release
bare_skip='' bare_folder='' bare_group=''

# Run this script again as root: bare_root argument... Sets bare_skip to a reason if there
# can be no root file system.
bare_root()
{
	local root

	if [ "${ID:-}" != debian ]; then
		bare_skip='this machine does not run Debian'
	elif ! root=$(root_prefix); then
		bare_skip='a root file system needs root'
	elif [ -n "$root" ]; then
		exec sudo env "XDG_CACHE_HOME=${vm_cache%/*}" "$0" "$@"
	fi
}

# Choose the folder, which is removed at the end, and install the tools.
bare_begin()
{
	bare_folder=$1
	trap bare_end EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	mkdir -p "$vm_own" && "$vm_dir/setup"
}

bare_end()
{
	[ -z "$bare_group" ] || kill -KILL -- "-$bare_group"
	# Only the processes inside see the mounts, which end with them.
	rm -rf --one-file-system -- "$bare_folder"
}

# Create a root file system of a release with these packages: bare RELEASE PACKAGE,...
bare()
{
	bare_end
	mkdir -p "$bare_folder/root" &&
		"$vm_dir/apt" sources "$1" >"$bare_folder/sources" &&
		mmdebstrap --quiet --mode=root --variant=minbase --dpkgopt=force-unsafe-io \
			--aptopt='Acquire::Retries "3"' --include="$2" \
			"$1" "$bare_folder/root" "$bare_folder/sources" || return
	# The network configuration and certificates of this machine.
	cp -L /etc/resolv.conf /etc/hosts "$bare_folder/root/etc" &&
		cp -r /usr/local/share/ca-certificates "$bare_folder/root/usr/local/share" &&
		mkdir -p "$bare_folder/root/etc/ssl/certs" &&
		cp -L /etc/ssl/certs/ca-certificates.crt "$bare_folder/root/etc/ssl/certs"
}

# Run a command in it. The end of the first process ends all others and the mounts.
# shellcheck disable=SC2016 # expanded by the inner shell
bare_inside()
{
	local name keep=()

	for name in http_proxy https_proxy no_proxy SSL_CERT_FILE PIP_CERT; do
		[ -z "${!name:-}" ] || keep+=("$name=${!name}")
	done
	timeout --foreground 1800 unshare --mount --pid --fork --kill-child -- sh -c '
		mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" &&
		exec chroot "$0" "$@"' "$bare_folder/root" \
		env -i HOME=/root LANG=C.UTF-8 \
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		"${keep[@]}" "$@"
}

# Run a command in a process group of its own.
bare_grouped()
{
	local status

	set -m
	"$@" 2>&1 </dev/null | sed -u 's/^/# /' &
	bare_group=$(jobs -p %+)
	set +m
	wait %+
	status=$?
	bare_group=
	return $status
}

# Run a command as the next test, unless an earlier one has failed: bare_try NAME COMMAND...
bare_try()
{
	local start=$SECONDS

	if [ -n "$bare_skip" ]; then
		tap_result 0 "$1 # SKIP $bare_skip"
	elif [ "$tap_failed" = 0 ]; then
		bare_grouped "${@:2}"
		tap_result $? "$1"
		echo "# $((SECONDS - start)) s"
	else
		tap_result 1 "$1"
	fi
}
