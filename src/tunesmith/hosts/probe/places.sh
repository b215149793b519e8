# shellcheck shell=sh
# Where tunesmith's folder is, or would be. It says nothing by itself: what needs the folder for
# a command of its own, as the agent does, is sent after this text alone.
#
#   TUNESMITH_PROBE_DISKS  words: where a data disk may be mounted, in the order of looking
#   TUNESMITH_PROBE_MARKER the file that a finished environment has
#   TUNESMITH_PROBE_BASE   the folder, where it is not to be found but given

# Sets $provisioned: the folder of a host that was provisioned to its end, else empty. Start files
# name it, wherever it is (preflight_base); else it is on the first data disk that has one.
find_provisioned() {
    provisioned=$(sed -n "/^# BEGIN tunesmith/,/^# END tunesmith/s/^if \[ -r '*\(.*\)\/env\.sh'* \]; .*/\1/p" \
        "$HOME/.bashrc" "$HOME/.bash_profile" "$HOME/.bash_login" "$HOME/.profile" 2>/dev/null |
        sed 1q)
    [ -f "$provisioned/state.json" ] || provisioned=
    for place in ${TUNESMITH_PROBE_DISKS:-}; do
        [ -z "$provisioned" ] || return 0
        [ ! -f "${root:-}$place/tunesmith/state.json" ] || provisioned=${root:-}$place/tunesmith
    done
    if [ -z "$provisioned" ] && [ -f "$HOME/tunesmith/state.json" ]; then
        provisioned=$HOME/tunesmith
    fi
}

# Sets $environment: the finished training environment in $provisioned, else empty.
find_environment() {
    environment=
    for place in "$provisioned"/envs/*/; do
        # shellcheck disable=SC2034  # for who sends this
        [ ! -f "$place$TUNESMITH_PROBE_MARKER" ] || environment=${place%/}
    done
}

# Sets $data_disk, $hf_cache and $base, tunesmith's folder: the one that was given, that is there, or that
# would be made. The data disk is the first writable candidate that is a file system of its own,
# else the first writable one, else the home folder.
find_places() {
    find_provisioned
    base=${TUNESMITH_PROBE_BASE:-$provisioned}
    if [ -n "$base" ]; then
        data_disk=${base%/*}
        data_disk=${data_disk:-/}
    else
        find_data_disk
        base=${data_disk%/}/tunesmith
    fi
    # Beside the folder, so that other programs may share it.
    # shellcheck disable=SC2034  # for the sections
    hf_cache=${data_disk%/}/Hugging-Face
}

find_data_disk() {
    data_disk=
    plain=
    for place in ${TUNESMITH_PROBE_DISKS:-}; do
        folder=${root:-}$place
        [ -d "$folder" ] && [ -w "$folder" ] || continue
        plain=${plain:-$folder}
        grep -q "^[^ ]* $place " "${root:-}/proc/mounts" && data_disk=$folder && break
    done
    data_disk=${data_disk:-${plain:-$HOME}}
}
