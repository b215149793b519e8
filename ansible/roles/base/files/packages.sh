#!/bin/sh
# Installs Debian packages from the first source that has them.
#
# sh packages.sh "PACKAGE ..." MIRROR...
# A mirror is tried with a list of its own; /etc/apt is left as it is.
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
packages=$1
shift

get() {
    # Another installation (the first boot's, say) may hold apt's lock for a while. The
    # environment, which takes longer, comes first. Nobody reads translated descriptions here.
    nice -n 19 apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 \
        -o Acquire::Languages=none "$@"
}

install() {
    get "$@" update || return 1
    set -- "$@" install --yes --no-install-recommends --reinstall
    for package in $packages; do set -- "$@" "$package"; done
    get "$@"
}

main() {
    command -v apt-get >/dev/null || {
        echo "no apt-get here; install with the host's own tool: $packages" >&2
        return 1
    }
    # shellcheck source=/dev/null
    . /etc/os-release
    lists=$(mktemp -d) || return 1
    trap 'rm -rf "$lists"' EXIT
    for mirror in "$@"; do
        {
            for suite in "$VERSION_CODENAME" "$VERSION_CODENAME-updates"; do
                echo "deb $mirror/$ID $suite main"
            done
        } >"$lists/mirror.list"
        install -o "Dir::Etc::SourceList=$lists/mirror.list" -o Dir::Etc::SourceParts=- && return
    done
    install
}

main "$@" </dev/null
