#!/bin/sh
# Makes a conda prefix, from the first channel that has its packages; what lies there is removed.
#
# sh create_prefix.sh BASE PREFIX CONDA MARK PACKAGES SHOW EXPECTED CHANNEL...
# PACKAGES are separated by spaces. SHOW, a command of the prefix, must print EXPECTED.
# Leaves the file MARK in it when all went well.
umask 077
base=$1 prefix=$2 conda=$3 mark=$4 packages=$5 show=$6 expected=$7
shift 7

# On the prefix's own file system, so that files are linked and not copied, and the packages
# outlive a rebuilt instance.
export CONDA_PKGS_DIRS="$base/cache/conda" TMPDIR="$base/tmp"
export CONDA_NOTIFY_OUTDATED_CONDA=false CONDA_REPORT_ERRORS=false PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME

create() {
    rm -rf "$prefix"
    # shellcheck disable=SC2086  # words
    "$conda" create --yes --prefix "$prefix" --override-channels --channel "$1" $packages ||
        return 1
    # shellcheck disable=SC2086  # words
    "$prefix/"$show 2>&1 | grep -F "$expected"
}

main() {
    mkdir -p "$base/tmp"
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    # Somebody else's run may have made it while we waited.
    [ -e "$prefix/$mark" ] && return
    for round in first second; do
        for channel in "$@"; do
            if create "$channel"; then
                : >"$prefix/$mark"
                echo "made from $channel"
                return
            fi
            echo "$channel did not do" >&2
        done
        # A package that a crash left damaged would fail every time.
        [ "$round" = second ] || rm -rf "$CONDA_PKGS_DIRS"
    done
    rm -rf "$prefix"
    return 1
}

main "$@" </dev/null
