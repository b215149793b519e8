#!/bin/sh
# Puts what was sent into its places, whole or not at all.
#
# receive BASE APP
# Standard input is base64 of a tar.gz: lock/ (files for BASE/cache), app.tar.gz (tunesmith's
# sources, for the folder APP), data/ (for BASE/data, where no registry is). Prints a line
# for each that was put there.
umask 077

receive() {
    base=$1 app=$2
    mkdir -p "$base/cache" || return 1
    sent=$base/cache/sent.$$
    trap 'rm -rf "$sent"' EXIT
    mkdir "$sent" && base64 -d | tar -xzf - -C "$sent" || return 1
    if [ -d "$sent/lock" ]; then
        for file in "$sent"/lock/*; do mv -f "$file" "$base/cache/" || return 1; done
        echo lock
    fi
    if [ -e "$sent/app.tar.gz" ]; then
        mkdir -p "$sent/app" "${app%/*}" && tar -xzf "$sent/app.tar.gz" -C "$sent/app" || return 1
        rm -rf "$app" && mv "$sent/app" "$app" || return 1
        echo app
    fi
    # A folder with a registry is the user's; the registry comes last, so that what an
    # interrupted run left is not taken for one.
    if [ -d "$sent/data" ] && [ ! -e "$base/data/dataset_info.json" ]; then
        mkdir -p "$base/data" || return 1
        for file in "$sent"/data/*; do
            name=${file##*/}
            [ "$name" = dataset_info.json ] || [ -e "$base/data/$name" ] ||
                mv "$file" "$base/data/$name" || return 1
        done
        mv "$sent/data/dataset_info.json" "$base/data/" || return 1
        echo data
    fi
}
