#!/bin/sh
# Waits for what start.sh started: prints what it printed and ends with its exit code.
#
# sh wait.sh FOLDER NAME SECONDS
# 75: it still runs after SECONDS. 76: it is gone without an end. Whoever asks again gets the
# same answer: an asker whose connection broke may still be here, and read it first.
job=$1/$2 ends=$(($(date +%s) + $3))

while [ ! -e "$job.rc" ]; do
    [ -e "$job.sh" ] || {
        echo "$job: there is no such job; run this again" >&2
        exit 76
    }
    if [ -e "$job.pid" ] && ! kill -0 "$(cat "$job.pid")" 2>/dev/null && [ ! -e "$job.rc" ]; then
        cat "$job.err" >&2
        echo "it was cut off before its end (was the host restarted?); run this again" >&2
        exit 76
    fi
    [ "$(date +%s)" -lt "$ends" ] || exit 75
    sleep 0.5
done
cat "$job.out"
cat "$job.err" >&2
exit "$(cat "$job.rc")"
