#!/bin/sh
# Brings what the base image lacks: sh install_packages.sh PYTHON PACKAGES_SH
#
# A base that has all of it costs no package and no network. /run/secrets/mirror, where it is
# there, names APT_MIRRORS. Triton compiles its launchers with gcc and Python's headers.
set -eu
python=$1 packages=$2

want=''
command -v "$python" >/dev/null || want="$python lib$python-dev"
command -v tini >/dev/null || want="$want tini"
command -v gcc >/dev/null || want="$want gcc"
[ -e /usr/include/stdlib.h ] || want="$want libc6-dev"
[ -n "$want" ] || exit 0

APT_MIRRORS=''
# shellcheck source=/dev/null
[ ! -e /run/secrets/mirror ] || . /run/secrets/mirror
[ ! -e /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
# shellcheck disable=SC2086 # addresses hold no spaces
sh "$packages" "$want" $APT_MIRRORS
# Documentation, and libraries for linking statically: nothing here does.
rm -rf /usr/share/doc /usr/share/man /usr/share/info /var/cache/debconf/*-old
find /usr/lib -name 'lib*.a' ! -name 'libgcc*' ! -name 'libc_nonshared.a' -delete
# Sanitizers and link-time optimisation, which come with gcc and are not used by it here.
rm -f /usr/lib/x86_64-linux-gnu/lib[alt]san.so* /usr/lib/x86_64-linux-gnu/libubsan.so* \
    /usr/lib/x86_64-linux-gnu/libhwasan.so* /usr/lib/gcc/x86_64-linux-gnu/*/lto1
