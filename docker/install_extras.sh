#!/bin/sh
# Adds extras to the environment: sh install_extras.sh MARKER PYTHON NAMES [SOURCE...]
#
# NAMES are separated by spaces; /extras holds a lock for each. SOURCE packages are built. MARKER,
# the file of the environment that says what it was made of, names its extras then, as on a host.
set -eu
marker=$1 environment=${1%/*} python=$2 names=$3
shift 3

said=''
: >/tmp/extras.txt
for name in $names; do
    cat "/extras/$name.txt" >>/tmp/extras.txt
    digest=$(sha256sum "/extras/$name.txt")
    said="$said${said:+, }\"$name\": \"${digest%% *}\""
done
# A package that several of them need stands in each, in one version.
awk '/^[A-Za-z0-9]/ { take = !seen[$1]++ } take' /tmp/extras.txt >/tmp/extras-once.txt
LOCK=/tmp/extras-once.txt sh /install_lock.sh "$environment" "$python" all "$@"
sed -i "s/}\$/, \"extras\": {$said}}/" "$marker"
rm /tmp/extras.txt /tmp/extras-once.txt
