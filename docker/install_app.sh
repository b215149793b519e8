#!/bin/sh
# Copies a part of the repository in /mnt: sh install_app.sh APP PART
#
# PART is settings, packages, modules or job: a layer each, so that a change moves a part and not
# all. Modules are the rooms that all others use, packages those others but job. Modes and times
# are set here: a part whose files are the same is the same layer, whoever cloned the repository
# and whatever else has changed.
set -eu
app=$1 part=$2
shared="basemodel core dataset plan stack"
umask 022
case $part in
settings)
    into=$app
    cd /mnt
    set -- configs data pyproject.toml
    ;;
packages)
    into=$app/src/tunesmith
    cd /mnt/src/tunesmith
    set --
    for folder in */; do
        case " job $shared " in
        *" ${folder%/} "*) ;;
        *) set -- "$@" "${folder%/}" ;;
        esac
    done
    ;;
modules)
    into=$app/src/tunesmith
    cd /mnt/src/tunesmith
    set --
    for file in *; do [ ! -f "$file" ] || set -- "$@" "$file"; done
    # shellcheck disable=SC2086 # words of ours
    set -- "$@" $shared
    ;;
job)
    into=$app/src/tunesmith
    cd /mnt/src/tunesmith
    set -- job
    ;;
*)
    echo "no part $part" >&2
    exit 2
    ;;
esac
mkdir -p "$app/src/tunesmith"
cp -R --no-preserve=mode,ownership,timestamps -- "$@" "$into/"
cd "$into"
find "$@" -exec touch --no-create --date @0 {} +
# The folders above are part of the layer, too.
touch --date @0 "${app%/*}" "$app" "$app/src" "$app/src/tunesmith"
