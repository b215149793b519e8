#!/bin/sh
# Makes a conda prefix that holds an nvcc; what lies there before is removed.
#
# sh install_toolkit.sh BASE PREFIX CONDA VERSION CHANNEL...
# Leaves .tunesmith-complete in it when all went well.
umask 077
base=$1 prefix=$2 conda=$3 version=$4
shift 4

export CONDA_PKGS_DIRS="$base/cache/conda" TMPDIR="$base/tmp"
export CONDA_NOTIFY_OUTDATED_CONDA=false CONDA_REPORT_ERRORS=false PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME

create() {
    rm -rf "$prefix"
    # The headers and the runtime library that what nvcc makes is linked with.
    "$conda" create --yes --prefix "$prefix" --override-channels --channel "$1" \
        "cuda-nvcc=$version" "cuda-cudart-dev=$version" || return 1
    "$prefix/bin/nvcc" --version | grep -F "release $version"
}

main() {
    mkdir -p "$base/tmp"
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    [ -e "$prefix/.tunesmith-complete" ] && return
    for channel in "$@"; do
        if create "$channel"; then
            : >"$prefix/.tunesmith-complete"
            return
        fi
        echo "$channel did not do" >&2
    done
    rm -rf "$prefix"
    return 1
}

main "$@" </dev/null
