# shellcheck shell=sh
# shellcheck disable=SC2154  # common.sh and places.sh set what is not set here
# Sections user, system, resources, places, disks: what kind of machine it is, and its room.

section_user() {
    say user "$(id -un 2>/dev/null)"
    say uid "$(id -u)"
    say gid "$(id -g)"
    say home "$HOME"
    login=.profile
    for file in .bash_login .bash_profile; do
        [ -e "$HOME/$file" ] && login=$file
    done
    say login_file "$HOME/$login"
}

section_system() {
    say epoch "$(date +%s)"
    while IFS='=' read -r key value; do
        value=${value#[\"\']}
        value=${value%[\"\']}
        case $key in
        ID) say os.id "$value" ;;
        VERSION_ID) say os.version "$value" ;;
        PRETTY_NAME) say os.name "$value" ;;
        esac
    done 2>/dev/null <"$root/etc/os-release"
    say kernel "$(uname -r)"
    say arch "$(uname -m)"
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) ||
        libc=$(ldd --version 2>&1 | sed -n -e 's/.*\(musl\).*/\1/p' \
            -e '1s/.*[^0-9.]\([0-9][0-9]*\.[0-9][0-9]*\)$/glibc \1/p' | sed 1q)
    say libc "$libc"
    if [ "$(id -u)" = 0 ]; then
        say sudo root
    elif ! have sudo; then
        say sudo absent
    elif limited 3 sudo -n true >/dev/null 2>&1; then
        say sudo yes
    else
        say sudo no
    fi
    if [ -d "$root/run/systemd/system" ]; then say systemd yes; else say systemd no; fi
    read -r first <"$root/proc/1/comm"
    say pid1 "$first"
    hints=
    [ -e "$root/.dockerenv" ] && hints="$hints dockerenv"
    [ -e "$root/run/.containerenv" ] && hints="$hints containerenv"
    grep -qE 'docker|kubepods|containerd|libpod|lxc' "$root/proc/1/cgroup" 2>/dev/null &&
        hints="$hints cgroup"
    grep -qE '^[^ ]+ / (overlay|aufs|fuse-overlayfs) ' "$root/proc/mounts" 2>/dev/null &&
        hints="$hints overlay"
    tr '\0' '\n' 2>/dev/null <"$root/proc/1/environ" | grep -q '^container=' &&
        hints="$hints environment"
    say container "${hints# }"
    say machine "$(cat "$root/sys/class/dmi/id/sys_vendor" \
        "$root/sys/class/dmi/id/product_name" 2>/dev/null | tr '\n' ' ')"
}

# smaller A B: the smaller number; an empty one counts as endless.
smaller() {
    if [ -z "$1" ] || { [ -n "$2" ] && [ "$2" -lt "$1" ]; }; then echo "$2"; else echo "$1"; fi
}

# below MOUNT PATH: the own control group's folder and its parents, innermost first.
below() {
    path=$2
    case $path in */..*) path= ;; esac
    while [ -n "${path%/}" ]; do
        [ -d "$1$path" ] && echo "$1$path"
        path=${path%/*}
    done
    echo "$1"
}

section_resources() {
    control=$root/sys/fs/cgroup
    groups=$root/proc/self/cgroup
    cpu=
    memory=
    used=
    if [ -e "$control/cgroup.controllers" ]; then
        say cgroup v2
        for folder in $(below "$control" "$(sed -n 's/^0:://p' "$groups")"); do
            if read -r quota period 2>/dev/null <"$folder/cpu.max" && [ "$quota" != max ]; then
                cpu=$(smaller "$cpu" $((quota * 1000 / period)))
            fi
            if read -r limit 2>/dev/null <"$folder/memory.max" && [ "$limit" != max ]; then
                memory=$(smaller "$memory" "$limit")
            fi
            if [ -z "$used" ] && read -r used 2>/dev/null <"$folder/memory.current"; then
                cache=$(sed -n 's/^inactive_file //p' "$folder/memory.stat")
                used=$((used - ${cache:-0}))
            fi
        done
    elif [ -d "$control/memory" ]; then
        say cgroup v1
        own=$(sed -n 's/^[0-9]*:\([^:]*,\)*memory\(,[^:]*\)*:\(.*\)/\3/p' "$groups")
        folder=$(below "$control/memory" "$own" | sed 1q)
        memory=$(sed -n 's/^hierarchical_memory_limit //p' "$folder/memory.stat")
        cache=$(sed -n 's/^total_inactive_file //p' "$folder/memory.stat")
        read -r used <"$folder/memory.usage_in_bytes"
        used=$((used - ${cache:-0}))
        own=$(sed -n 's/^[0-9]*:\([^:]*,\)*cpu\(,[^:]*\)*:\(.*\)/\3/p' "$groups")
        for mount in cpu cpu,cpuacct; do
            [ -d "$control/$mount" ] || continue
            for folder in $(below "$control/$mount" "$own"); do
                read -r quota 2>/dev/null <"$folder/cpu.cfs_quota_us" || continue
                read -r period <"$folder/cpu.cfs_period_us"
                [ "$quota" -gt 0 ] && cpu=$(smaller "$cpu" $((quota * 1000 / period)))
            done
            break
        done
    fi
    say cpu.count "$(nproc 2>/dev/null || grep -c '^processor' /proc/cpuinfo)"
    say cpu.thousandths "$cpu"
    say memory.total "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' "$root/proc/meminfo")"
    say memory.available "$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' "$root/proc/meminfo")"
    say memory.limit "$memory"
    say memory.used "$used"
}

# `room` is the file system that holds the folder, or would.
section_places() {
    say provisioned "$provisioned"
    say data_disk "$data_disk"
    say base "$base"
    say hf_cache "$hf_cache"
    there=$base
    while [ ! -d "$there" ]; do
        there=${there%/*}
        there=${there:-/}
    done
    if [ -w "$there" ]; then say writable yes; else say writable no; fi
    disk room "$there"
}

section_disks() {
    disk disk /
    disk disk "$HOME"
    for place in ${TUNESMITH_PROBE_DISKS:-}; do
        [ -d "$root$place" ] && disk disk "$root$place"
    done
    # Where it was given, or start files name it.
    disk disk "$data_disk"
    [ -d /dev/shm ] && disk disk /dev/shm
}
