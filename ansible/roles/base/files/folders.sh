#!/bin/sh
# Makes folders that only their owner can look into; one that is there is closed.
#
# sh folders.sh FOLDER...
umask 077
for folder in "$@"; do
    mkdir -p "$folder" || exit 1
    chmod 700 "$folder" || exit 1
done
