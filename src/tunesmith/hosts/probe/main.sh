# shellcheck shell=sh
# The end of the probe's script: runs the sections that were asked for, in one process tree.
# Read-only. Runs as `sh -s` (dash, busybox), so nothing may read stdin: it gets /dev/null.
#
#   TUNESMITH_PROBE_SECTIONS  words: which sections
#
# Keys may repeat. In values %, line feed and carriage return are %25, %0A, %0D. The line `end`
# comes last: without it the answer was cut short.

probe() {
    start=$(ticks)
    say tunesmith_probe 2
    find_places
    for section in ${TUNESMITH_PROBE_SECTIONS:?}; do
        case $section in
        # What waits for others waits beside the rest.
        bashrc | condas | gpu | gpu_use | mirrors | pythons) "section_$section" & ;;
        *) "section_$section" ;;
        esac
    done
    wait
    say end "$(seconds "$start")"
}

probe </dev/null
