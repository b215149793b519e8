#!/bin/sh
# Starts the script on standard input so that nothing can end it, and prints its name.
#
# start FOLDER ARGUMENT...
# FOLDER/NAME.pid, .out, .err, and at its end .rc (its exit code) tell the rest.
umask 077

start() {
    folder=$1
    shift
    mkdir -p "$folder" || return 1
    # What older runs left: nobody asks for it any more.
    find "$folder" -type f -mtime +1 -exec rm -f {} +
    name=$(date +%s).$$
    job=$folder/$name
    cat >"$job.sh" || return 1
    # A session of its own: neither a lost connection nor a signal to ours reaches it.
    # shellcheck disable=SC2209  # a word
    detached=nohup
    ! command -v setsid >/dev/null || detached='setsid'
    # shellcheck disable=SC2016  # the inner shell's
    $detached sh -c '
        job=$1
        shift
        echo $$ >"$job.pid"
        sh "$job.sh" "$@"
        echo $? >"$job.part"
        mv "$job.part" "$job.rc"
    ' sh "$job" "$@" </dev/null >"$job.out" 2>"$job.err" &
    echo "$name"
}
