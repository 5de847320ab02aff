# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The compiler with the options of kbuild. To be sourced after vm/lib.sh; changes to the
# top folder of the repository.

# shellcheck disable=SC2154 # the variables of vm/lib.sh

cd "$vm_top" || exit 1
tool_env
scratch=$(mktemp -d) || exit 1
trap 'rm -rf -- "$scratch"' EXIT

# Get the options of kbuild for the object $1.o, without those for the object file and
# those that match $2.
rustc_options()
{
	local cmd=${1%/*}/.${1##*/}.o.cmd command word skip=0 words=()

	command=$(sed -n '1s/^savedcmd_[^ ]* := //p' "$cmd" 2>/dev/null)
	[ -n "$command" ] || return
	# The words of a shell command of kbuild; objtool may follow.
	eval "words=(${command%%;*})"
	rustc_env=(RUSTC_BOOTSTRAP=1) rustc_flags=()
	for word in "${words[@]}"; do
		if [ $skip = 1 ]; then
			skip=0
			continue
		fi
		case $word in
		OBJTREE=*|RUST_MODFILE=*) rustc_env+=("$word") ;;
		rustc|*/rustc|clippy-driver|*/clippy-driver|--emit=*) ;;
		--out-dir) skip=1 ;;
		*)
			# shellcheck disable=SC2053 # a pattern
			[[ $word == $2 ]] || rustc_flags+=("$word")
			;;
		esac
	done
}

# Compile a source file as the root of a driver's crate: rustc_emit KIND FILE. DRIVER
# is the driver on the front page of the crate. Other output of the compiler, such as
# names of types that are too long to print, goes to $scratch.
rustc_emit()
{
	env "${rustc_env[@]}" DRIVER="$scratch/driver.rs" "$RUSTC" \
		"${rustc_flags[@]}" --out-dir "$scratch" \
		--emit="$1=$scratch/emitted" "${@:2}"
}

# Write the examples in the documentation of the crate, and list them.
examples()
{
	local sources

	sources=$(find rust/vfio -name '*.rs' ! -name lib.rs | sort)
	# shellcheck disable=SC2086 # no blanks in them
	tools/testing/examples/extract "$scratch" rust/vfio/lib.rs $sources \
		>"$scratch/examples" &&
		read -r driver _ <"$scratch/examples" &&
		cp -- "$scratch/$driver.rs" "$scratch/driver.rs"
}

# Prepare rustc_emit. The crate of an earlier commit would hide a change of its interface.
rustc_setup()
{
	if ! "$vm_dir/modules" >"$scratch/modules" 2>&1; then
		cat -- "$scratch/modules"
		echo 'Bail out! the modules do not build'
		exit 1
	fi
	if ! rustc_options samples/vfio_minimal/vfio_minimal '@(-Dwarnings|samples/*.rs)'; then
		echo 'Bail out! the options of the compiler are not known'
		exit 1
	fi
	if ! examples; then
		echo 'Bail out! the documentation has no examples'
		exit 1
	fi
	echo "# $("$RUSTC" --version)"
}
