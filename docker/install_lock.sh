#!/bin/sh
# Installs one part of a hashed lock: sh install_lock.sh ENVIRONMENT PYTHON PART [SOURCE...]
#
# LOCK in the environment names another file than /lock/lock.txt.
#
# PART is nvidia, torch or all; what is there already is not installed again, so the parts
# become layers. /lock holds lock.txt, build-constraints.txt; /uv/bin/uv installs. SOURCE
# packages are built. /run/secrets/mirror (PYPI_INDEXES) and /run/secrets/ca are optional.
#
# uv's cache lies in the environment's file system for the time of one layer: wheels are
# unpacked once and linked, so a layer needs its own size and no more.
set -eu
environment=$1 python=$2 part=$3
shift 3

case $part in
nvidia) names='^nvidia-' ;;
torch) names='^(torch|triton)==' ;;
all) names=. ;;
*)
    echo "no part $part" >&2
    exit 2
    ;;
esac

PYPI_INDEXES=''
# shellcheck source=/dev/null
[ ! -e /run/secrets/mirror ] || . /run/secrets/mirror
[ ! -e /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
export UV_NO_CONFIG=1 UV_NO_PROGRESS=1 UV_PYTHON_DOWNLOADS=never
export UV_CACHE_DIR="${environment%/*}/.uv-cache" TMPDIR="${environment%/*}/.tmp"
# DeepSpeed's kernels are compiled when a run asks for one, not for every run beforehand.
export DS_BUILD_OPS=0
umask 022

# An entry of the lock: its line and the hashes that are continued below it.
awk -v names="$names" '
    /^[A-Za-z0-9]/ { take = $0 ~ names }
    take' "${LOCK:-/lock/lock.txt}" >/tmp/part.txt

install() {
    set -- "$@" --compile-bytecode --no-deps --require-hashes --only-binary :all:
    /uv/bin/uv pip install --quiet --python "$environment/bin/python" "$@" \
        --build-constraints /lock/build-constraints.txt --requirements /tmp/part.txt
}

[ -e "$environment/bin/python" ] || /uv/bin/uv venv --quiet --python "$python" "$environment"
mkdir -p "$TMPDIR"
for package in "$@"; do set -- "$@" --no-binary "$package"; shift; done
installed=''
for index in ${PYPI_INDEXES:-https://pypi.org/simple}; do
    if install --default-index "$index" "$@"; then
        installed=$index
        break
    fi
    echo "$index did not do" >&2
done
[ -n "$installed" ]

# Left out without loss: libraries to link statically, the packages' own tests, the sources
# of minified scripts.
packages=$(echo "$environment"/lib/python*/site-packages)
find "$packages" -name '*.a' -delete
find "$packages" -name '*.map' -path '*/gradio/*' -delete
find "$packages" -mindepth 2 -type d -name tests -prune -exec rm -rf {} +
rm -rf "$UV_CACHE_DIR" "$TMPDIR" /tmp/part.txt
