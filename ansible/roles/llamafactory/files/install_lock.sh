#!/bin/sh
# Installs a hashed lock into a fresh environment, with uv, trying one index after another.
#
# sh install_lock.sh WHAT BASE ENVIRONMENT PYTHON LOCK_SHA256 PYTHON_VERSION VERSION SOURCES \
#     UNCOMPILED INDEX...
# WHAT is `fetch`: only get uv and download the large packages into its cache, by any PYTHON
# with pip; the environment may be made meanwhile. Or `install`: leaves
# .tunesmith-installed-LOCK_SHA256 when all is there and llamafactory-cli answers with VERSION.
# Or `extras`: adds locks to a finished environment; LOCK_SHA256 are then several, by spaces.
# SOURCES, separated by spaces, are built from source; UNCOMPILED are patterns of modules whose
# bytecode is not made. BASE/cache holds the lock (LOCK_SHA256.txt), build-constraints.txt,
# bytecode.py, which reads the patterns, wheel_download.py and, for uv itself, control.txt.
umask 077
what=$1 base=$2 environment=$3 python=$4 digest=$5 python_version=$6 version=$7
sources=$8 uncompiled=$9
shift 9

cache=$base/cache
lock=$cache/$digest.txt
fetched=$cache/fetched-$digest
wheels=$cache/wheels
uv=$base/uv
done_mark=$environment/.tunesmith-installed-$digest

export TMPDIR="$base/tmp" UV_CACHE_DIR="$cache/uv" UV_NO_CONFIG=1 UV_NO_PROGRESS=1
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=2
export PIP_ROOT_USER_ACTION=ignore
# The image's pip.conf may name an index without TLS.
export PIP_CONFIG_FILE=/dev/null
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV CONDA_PREFIX
unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_NO_INDEX
# DeepSpeed's kernels are compiled when a run asks for one, not for every run beforehand.
export DS_BUILD_OPS=0
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
        "$python" -I -m pip install --quiet --no-cache-dir --target "$uv.part" --require-hashes \
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
# installed and compiled; what is built from source comes from the index itself.
split_lock() {
    awk -v names="$sources" -v large="$cache/large.$$.txt" -v rest="$cache/rest.$$.txt" \
        -v built="$cache/built.$$.txt" '
        BEGIN { number = split(names, list, " "); for (i = 1; i <= number; i++) source[list[i]] }
        /^[A-Za-z0-9]/ {
            name = $0
            sub(/==.*/, "", name)
            file = name in source ? built : name ~ /^(nvidia-.*|torch|triton)$/ ? large : rest
        }
        file { print >file }' "$lock"
}

# What has come of a file stays, whatever ends us: it grows as a file of its own and goes on
# where it ended (wheel_download.py). It is unpacked into uv's cache through an index on this disk.
# The file goes then; the index stays, and uv finds in its cache what that lists.
bring() { # INDEX PART: prints the packages of PART.$$.txt, each when it is whole
    files=$cache/pylock.$2-$digest.toml
    if [ ! -s "$files" ]; then
        asked=$cache/pylock.$2-$$.toml
        "$uv/bin/uv" pip compile --quiet --no-deps --format pylock.toml --python "$python" \
            --python-version "$python_version" --default-index "$1" --output-file "$asked" \
            "$cache/$2.$$.txt" >/dev/null && mv "$asked" "$files" || return 1
    fi
    # The next index may be better.
    "$python" -I "$cache/wheel_download.py" "$wheels" "$files" || { rm -f "$files" && false; }
}

fetch() { # INDEX...: the large ones; where it fails, the installation tries again itself
    exec 8>"$base/.fetch.lock"
    flock 8
    [ -e "$fetched" ] && [ -d "$wheels" ] && return
    for index in "$@"; do
        get_uv "$index" || continue
        bring "$index" large | {
            while read -r package; do unpack "$package" & done
            wait
        }
        # All of it is in the cache: links, no bytes.
        into_cache "$cache/large.$$.txt" all && : >"$fetched" && return
    done
    return 1
}

unpack() { # PACKAGE
    line=$base/tmp/$1.$$.txt
    sed -n "/^$1==/,/[^\\\\]\$/p" "$lock" >"$line"
    # What uv refuses (it has not the lock's hash) is not kept for the next time.
    into_cache "$line" "$1" || rm -f "$wheels/$1/index.html"
    rm -f "$line" "$wheels/$1"/*.whl
}

into_cache() { # FILE NAME
    uv_install "file://$wheels" "$1" --python "$python" --python-version "$python_version" \
        --target "$base/tmp/fetched.$$.$2"
    code=$?
    rm -rf "$base/tmp/fetched.$$.$2"
    return $code
}

install_rest() { # INDEX
    brought=$base/tmp/brought.$$
    bring "$1" rest >"$brought" &&
        uv_install "file://$wheels" "$cache/rest.$$.txt" --python "$python" ||
        uv_install "$1" "$cache/rest.$$.txt" --python "$python" || return 1
    while read -r package; do rm -f "$wheels/$package"/*.whl; done <"$brought"
    rm -f "$brought"
    [ ! -e "$cache/built.$$.txt" ] || uv_install "$1" "$cache/built.$$.txt" --python "$python"
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

# Bytecode of what is there; once more when the rest is.
compile() { # PREFIX...
    (
        flock 6
        set -f
        # shellcheck disable=SC2086  # words
        exec "$@" "$python" -I -S "$cache/bytecode.py" \
            "$environment/lib/python$python_version/site-packages" "$(workers)" $uncompiled
    ) 6>"$base/tmp/bytecode.lock" >/dev/null
}

install() { # INDEX
    get_uv "$1" && install_rest "$1" || return 1
    # What is on its way comes first.
    compile nice &
    # The index is not asked for its lists once more, 60 MB where they come unpacked.
    fetch "$@" && uv_install "file://$wheels" "$cache/large.$$.txt" --python "$python" && return
    uv_install "$1" "$lock" --python "$python"
}

answers() {
    compile || {
        echo "the bytecode of $environment could not be made" >&2
        return 1
    }
    said=$(cd "$base" && PATH="$environment/bin:/usr/local/bin:/usr/bin:/bin" \
        "$environment/bin/llamafactory-cli" version 2>&1)
    code=$?
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

# A package that several of them need stands in each, in one version.
add_extras() { # INDEX...
    exec 9>"$base/.lock"
    flock --timeout 3600 9 || return 1
    for one in $digest; do cat "$cache/$one.txt"; done |
        awk '/^[A-Za-z0-9]/ { take = !seen[$1]++ } take' >"$cache/extras.$$.txt"
    for round in first second; do
        for index in "$@"; do
            if get_uv "$index" && uv_install "$index" "$cache/extras.$$.txt" --python "$python"; then
                compile && echo "added from $index"
                return
            fi
            echo "$round round: $index did not do" >&2
        done
    done
    return 1
}

main() {
    if [ "$what" = extras ]; then
        mkdir -p "$base/tmp"
        trap 'rm -f "$cache/extras.$$.txt"' EXIT
        add_extras "$@"
        return
    fi
    mkdir -p "$base/tmp" "$wheels"
    # What the index lists lies there.
    [ -d "$cache/uv" ] || rm -rf "$wheels"
    split_lock || return 1
    trap 'rm -f "$cache/large.$$.txt" "$cache/rest.$$.txt" "$cache/built.$$.txt"' EXIT
    case $what in
    fetch) fetch "$@" ;;
    install) install_all "$@" ;;
    esac
}

main "$@" </dev/null
