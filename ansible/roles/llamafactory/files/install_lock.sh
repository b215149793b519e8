#!/bin/sh
# Installs a hashed lock into a fresh environment, with uv, trying one index after another.
#
# sh install_lock.sh BASE ENVIRONMENT LOCK_SHA256 SOURCE_PACKAGES INDEX...
# SOURCE_PACKAGES, separated by spaces, are built from source. BASE/cache holds the lock
# (LOCK_SHA256.txt), build-constraints.txt and, for uv itself, control.txt.
# Leaves .tunesmith-installed-LOCK_SHA256 when all is there.
umask 077
base=$1 environment=$2 digest=$3 sources=$4
shift 4

cache=$base/cache
python=$environment/bin/python
uv=$base/uv
version=$(sed -n 's/^uv==\([^ ;]*\).*/\1/p' "$cache/control.txt")
done_mark=$environment/.tunesmith-installed-$digest

export TMPDIR="$base/tmp" UV_CACHE_DIR="$cache/uv" UV_NO_CONFIG=1 UV_NO_PROGRESS=1
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=2
# The image's pip.conf may name an index without TLS.
export PIP_CONFIG_FILE=/dev/null
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV CONDA_PREFIX
unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_NO_INDEX
unset UV_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL UV_FIND_LINKS

# uv brings its own authorities; those of the host may be the ones that count here.
if [ -z "$SSL_CERT_FILE" ]; then
    for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
        [ -s "$bundle" ] && export SSL_CERT_FILE="$bundle" && break
    done
fi

# Bytecode is compiled by one process a core: as many as the container's memory carries.
for file in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
    limit=$(cat "$file" 2>/dev/null)
    case $limit in
    '' | *[!0-9]*) continue ;;
    esac
    workers=$((limit / 402653184))
    [ "$workers" -ge 1 ] || workers=1
    [ "$workers" -ge "$(nproc)" ] || export UV_CONCURRENT_INSTALLS="$workers"
    break
done

get_uv() {
    [ "$("$uv/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" = "$version" ] && return
    rm -rf "$uv"
    # Its line of the lock, to the first that does not go on, with its hashes.
    sed -n '/^uv==/,/[^\\]$/p' "$cache/control.txt" >"$cache/uv.txt"
    "$python" -m pip install --quiet --no-cache-dir --target "$uv" --require-hashes --no-deps \
        --only-binary :all: --index-url "$1" --requirement "$cache/uv.txt"
}

install() {
    set -- --default-index "$1"
    for package in $sources; do set -- "$@" --no-binary "$package"; done
    "$uv/bin/uv" pip install --quiet --python "$python" --require-hashes --only-binary :all: "$@" \
        --build-constraints "$cache/build-constraints.txt" --compile-bytecode \
        --requirements "$cache/$digest.txt"
}

main() {
    mkdir -p "$base/tmp"
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    [ -e "$done_mark" ] && return
    if [ ! -e "$environment/.tunesmith-fresh" ]; then
        echo "$environment is not fresh: another run is at work on it; run this again" >&2
        return 1
    fi
    # From here on it is neither fresh nor done: a run that finds it so makes it again.
    rm "$environment/.tunesmith-fresh"
    for round in first second; do
        for index in "$@"; do
            if get_uv "$index" && install "$index"; then
                : >"$done_mark"
                echo "installed from $index"
                return
            fi
            echo "$round round: $index did not do" >&2
        done
    done
    return 1
}

main "$@" </dev/null
