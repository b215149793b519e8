#!/bin/sh
# Installs a hashed lock into a fresh environment, with uv, trying one index after another.
#
# sh install_lock.sh WHAT BASE ENVIRONMENT PYTHON LOCK_SHA256 PYTHON_VERSION VERSION SOURCES \
#     COMPILED INDEX...
# WHAT is `fetch`: only get uv and download the large packages into its cache, by any PYTHON
# with pip; the environment may be made meanwhile. Or `install`: leaves
# .tunesmith-installed-LOCK_SHA256 when all is there and llamafactory-cli answers with VERSION.
# SOURCES, separated by spaces, are built from source; of the packages COMPILED bytecode is
# made beforehand. BASE/cache holds the lock (LOCK_SHA256.txt), build-constraints.txt and, for
# uv itself, control.txt.
umask 077
what=$1 base=$2 environment=$3 python=$4 digest=$5 python_version=$6 version=$7
sources=$8 compiled=$9
shift 9

cache=$base/cache
lock=$cache/$digest.txt
fetched=$cache/fetched-$digest
uv=$base/uv
enough=$base/tmp/enough.$$
done_mark=$environment/.tunesmith-installed-$digest

export TMPDIR="$base/tmp" UV_CACHE_DIR="$cache/uv" UV_NO_CONFIG=1 UV_NO_PROGRESS=1
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=2
export PIP_ROOT_USER_ACTION=ignore
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

get_uv() { # INDEX
    wanted=$(sed -n 's/^uv==\([^ ;]*\).*/\1/p' "$cache/control.txt")
    [ "$("$uv/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" = "$wanted" ] && return
    (
        flock 7
        [ "$("$uv/bin/uv" --version 2>/dev/null | cut -d ' ' -f 2)" = "$wanted" ] && exit
        rm -rf "$uv" "$uv".part
        # Its line of the lock, to the first that does not go on, with its hashes.
        sed -n '/^uv==/,/[^\\]$/p' "$cache/control.txt" >"$cache/uv.txt"
        "$python" -m pip install --quiet --no-cache-dir --target "$uv.part" --require-hashes \
            --no-deps --only-binary :all: --index-url "$1" --requirement "$cache/uv.txt" &&
            mv "$uv.part" "$uv"
    ) 7>"$base/.uv.lock"
}

# The lock says everything, so that no package has to be asked what it depends on.
uv_install() { # INDEX FILE ...
    index=$1 file=$2
    shift 2
    set -- "$@" --default-index "$index" --requirements "$file"
    for package in $sources; do set -- "$@" --no-binary "$package"; done
    "$uv/bin/uv" pip install --quiet --require-hashes --no-deps --only-binary :all: \
        --build-constraints "$cache/build-constraints.txt" "$@"
}

# CUDA and torch are nine tenths of the bytes. While they are on their way, the rest is
# installed and compiled.
split_lock() {
    large='^(nvidia-|torch==|triton==)'
    awk -v wanted=1 -v large="$large" \
        '/^[A-Za-z0-9]/ { is = $0 ~ large } is == wanted' "$lock" >"$cache/large.$$.txt"
    awk -v wanted=0 -v large="$large" \
        '/^[A-Za-z0-9]/ { is = $0 ~ large } is == wanted' "$lock" >"$cache/rest.$$.txt"
}

fetch() { # INDEX...: into the cache; where it fails, the installation tries again itself
    exec 8>"$base/.fetch.lock"
    flock 8
    [ -e "$fetched" ] && [ -d "$cache/uv" ] && return
    for index in "$@"; do
        get_uv "$index" &&
            uv_install "$index" "$cache/large.$$.txt" --python "$python" \
                --python-version "$python_version" --target "$base/tmp/fetched.$$" &&
            : >"$fetched"
        rm -rf "$base/tmp/fetched.$$"
        [ -e "$fetched" ] && return
    done
    return 1
}

# As many processes as cores, and as the container's memory carries.
workers() {
    number=$(nproc)
    for file in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
        limit=$(cat "$file" 2>/dev/null)
        case $limit in
        '' | *[!0-9]*) continue ;;
        esac
        [ $((limit / 402653184)) -ge "$number" ] || number=$((limit / 402653184))
        break
    done
    [ "$number" -ge 1 ] || number=1
    echo "$number"
}

# Modules that nothing imports at its start are compiled when somebody imports them first.
compile() { # PACKAGE...: until there is a file $enough
    # shellcheck disable=SC2016  # the inner shell's
    (
        cd "$environment"/lib/python*/site-packages &&
            find "$@" -name '*.py' ! -path '*/test*/*' ! -path '*/models/*' 2>/dev/null |
            nice xargs -n 100 -P "$(workers)" sh -c '[ -e "$0" ] || exec "$@"' "$enough" \
                "$python" -m py_compile 2>/dev/null
    )
}

install() { # INDEX
    get_uv "$1" && uv_install "$1" "$cache/rest.$$.txt" --python "$python" || return 1
    # shellcheck disable=SC2086  # words
    compile $compiled &
    fetch "$@"
    uv_install "$1" "$lock" --python "$python"
}

# The first import writes the bytecode that is still missing.
answers() {
    compile torch torchvision triton &
    said=$(cd "$base" && PATH="$environment/bin:/usr/local/bin:/usr/bin:/bin" \
        "$environment/bin/llamafactory-cli" version 2>&1)
    code=$?
    # All that it imports is compiled now.
    : >"$enough"
    wait
    case $code:$said in
    0:*"version $version"*) return ;;
    esac
    printf '%s\n' "$said" "llamafactory-cli version: exit code $code, wanted is $version" >&2
    return 1
}

install_all() { # INDEX...
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
            if install "$index"; then
                answers || return 1
                : >"$done_mark"
                echo "installed from $index"
                return
            fi
            echo "$round round: $index did not do" >&2
        done
    done
    return 1
}

main() {
    mkdir -p "$base/tmp"
    split_lock || return 1
    trap 'rm -f "$cache/large.$$.txt" "$cache/rest.$$.txt" "$enough"' EXIT
    case $what in
    fetch) fetch "$@" ;;
    install) install_all "$@" ;;
    esac
}

main "$@" </dev/null
