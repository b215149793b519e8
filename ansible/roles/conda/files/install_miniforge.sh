#!/bin/sh
# Installs Miniforge into BASE/miniforge3; a half-made one is made again.
#
# sh install_miniforge.sh BASE INSTALLER
umask 077
base=$1 installer=$2 root=$1/miniforge3

main() {
    mkdir -p "$base/tmp"
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    # Somebody else's run may have made it while we waited.
    [ -e "$root/.tunesmith-complete" ] && return 0
    rm -rf "$root"
    TMPDIR=$base/tmp bash "$installer" -b -p "$root" || return 1
    "$root/bin/conda" --version || return 1
    rm -f "$installer"
    : >"$root/.tunesmith-complete"
}

main </dev/null
