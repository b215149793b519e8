#!/bin/sh
# Copies tunesmith and its configs from /context: sh install_app.sh APP PYTHON
#
# Modes are set here, so that the umask of who cloned the repository does not matter.
set -eu
app=$1 python=$2
umask 022
mkdir -p "$app/src"
cp -R --no-preserve=mode,ownership /context/src/tunesmith "$app/src/"
cp -R --no-preserve=mode,ownership /context/configs /context/data "$app/"
cp --no-preserve=mode,ownership /context/pyproject.toml "$app/"
# A read-only container could not do it at its starts.
"$python" -m compileall -q "$app/src"
