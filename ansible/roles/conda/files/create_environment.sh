#!/bin/sh
# Makes a conda environment that holds Python and pip; what lies there before is removed.
#
# sh create_environment.sh BASE ENVIRONMENT CONDA PYTHON CHANNEL...
# Leaves .tunesmith-fresh in it when all went well.
umask 077
base=$1 environment=$2 conda=$3 python=$4
shift 4

# On the environment's own file system, so that files are linked and not copied, and the
# packages outlive a rebuilt instance.
export CONDA_PKGS_DIRS="$base/cache/conda" TMPDIR="$base/tmp"
export CONDA_NOTIFY_OUTDATED_CONDA=false CONDA_REPORT_ERRORS=false PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME

create() {
    rm -rf "$environment"
    "$conda" create --yes --prefix "$environment" --override-channels --channel "$1" \
        "python=$python" pip || return 1
    [ "$("$environment/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = \
        "$python" ]
}

main() {
    mkdir -p "$base/tmp"
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    for round in first second; do
        for channel in "$@"; do
            if create "$channel"; then
                : >"$environment/.tunesmith-fresh"
                echo "made from $channel"
                return 0
            fi
            echo "$channel did not do" >&2
        done
        # A package that a crash left damaged would fail every time.
        [ "$round" = second ] || rm -rf "$CONDA_PKGS_DIRS"
    done
    rm -rf "$environment"
    return 1
}

main "$@" </dev/null
