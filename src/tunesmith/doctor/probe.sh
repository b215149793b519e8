#!/bin/sh
# What a host is, as key=value lines: read-only, one process tree, a few seconds at most.
# Runs as `sh -s` (dash, busybox), so nothing here may read stdin: main gets /dev/null.
#
# Set by the caller, ahead of this text:
#   TUNESMITH_PROBE_URLS   words "kind=url" to try in parallel
#   TUNESMITH_PROBE_PROXY  HTTP proxy for those
#   TUNESMITH_PROBE_CA     PEM text of the authorities to trust for those
#   TUNESMITH_PROBE_DISKS  words: where a data disk may be mounted, in the order of looking
#   TUNESMITH_PROBE_ENV    name of the conda environment to look for
#   TUNESMITH_PROBE_ROOT   folder that stands for / where /proc, /sys and /etc are read (tests)
#
# Keys may repeat. In values %, line feed and carriage return are %25, %0A, %0D. The line
# `end` comes last: without it the answer was cut short.

LC_ALL=C
export LC_ALL
root=${TUNESMITH_PROBE_ROOT:-}
lf='
'
cr=$(printf '\r')

# say KEY VALUE...: one line, one write, so that parallel parts never mix.
say() {
    key=$1
    shift
    value=$*
    case $value in
    *[%"$lf$cr"]*)
        value=$(printf '%s.' "$value" | sed -e 's/%/%25/g' -e "s/$cr/%0D/g" |
            sed -e ':a' -e '$!{N;ba' -e '}' -e 's/\n/%0A/g')
        value=${value%.}
        ;;
    esac
    printf '%s=%s\n' "$key" "$value"
}

have() { command -v "$1" >/dev/null 2>&1; }

# limited SECONDS COMMAND...: KILL, because an interactive shell ignores TERM.
if have timeout; then
    limited() { timeout -s KILL "$@"; }
else
    limited() {
        shift
        "$@"
    }
fi

# Hundredths of a second since boot: date has no fractions in POSIX.
ticks() {
    read -r up _ </proc/uptime
    echo "${up%.*}${up#*.}"
}

# seconds TICKS: how long ago that was.
seconds() {
    passed=$(($(ticks) - $1))
    printf '%d.%02d' $((passed / 100)) $((passed % 100))
}

# bare URL: without user name and password.
bare() {
    case $1 in
    *://*@*) echo "${1%%://*}://${1##*@}" ;;
    *@*) echo "${1##*@}" ;;
    *) echo "$1" ;;
    esac
}

system() {
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
    say user "$(id -un 2>/dev/null)"
    uid=$(id -u)
    say uid "$uid"
    say home "$HOME"
    if [ "$uid" = 0 ]; then
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

limits() {
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

# disk PATH: bytes in KiB and inodes, total and free; mount point last, it may hold spaces.
disk() {
    limited 2 df -Pk "$1" 2>/dev/null | sed 1d | {
        read -r _ total _ free _ mount || exit
        inodes=$(limited 2 df -Pi "$1" 2>/dev/null | sed 1d | {
            read -r _ count _ left _
            echo "$count $left"
        })
        say disk "$total $free ${inodes:-- -} $1|$mount"
    }
}

# The data disk is the first writable candidate that is a file system of its own, else the
# first writable one, else the home folder.
disks() {
    chosen=
    plain=
    disk /
    disk "$HOME"
    for place in ${TUNESMITH_PROBE_DISKS:-}; do
        [ -d "$root$place" ] || continue
        disk "$root$place"
        [ -w "$root$place" ] || continue
        plain=${plain:-$root$place}
        grep -q "^[^ ]* $place " "$root/proc/mounts" && chosen=${chosen:-$root$place}
    done
    [ -d /dev/shm ] && disk /dev/shm
    data=${chosen:-${plain:-$HOME}}
    base=${data%/}/tunesmith
    say data_disk "$data"
    say base "$base"
    there=$base
    while [ ! -d "$there" ]; do
        there=${there%/*}
        there=${there:-/}
    done
    if [ -w "$there" ]; then say writable yes; else say writable no; fi
    [ -e "$base/state.json" ] && say state "$base/state.json"
    env=$base/envs/${TUNESMITH_PROBE_ENV:-llama-factory}
    if [ -e "$env/.tunesmith-environment.json" ]; then
        say environment whole "$env"
        say marker "$(cat "$env/.tunesmith-environment.json")"
    elif [ -d "$env" ]; then
        say environment half "$env"
    fi
}

gpu() {
    smi=
    for place in nvidia-smi /usr/bin/nvidia-smi /usr/local/bin/nvidia-smi \
        /usr/lib/wsl/lib/nvidia-smi; do
        smi=$(command -v "$place" 2>/dev/null) && break
    done
    say nvidia_smi "$smi"
    sed -n 's/^NVRM version:.* \([0-9][0-9]*\.[0-9.]*\) .*/\1/p' \
        "$root/proc/driver/nvidia/version" 2>/dev/null |
        while read -r version; do say kernel_module "$version"; done
    [ -e "$root/dev/kfd" ] && say other_accelerator AMD
    [ -e "$root/dev/davinci0" ] && say other_accelerator Ascend
    [ -n "$smi" ] || return
    ask() { limited 4 "$smi" "$@" --format=csv,noheader 2>&1; }
    answer=$(ask --query-gpu=driver_version,compute_cap,memory.total,memory.used,name)
    code=$?
    case $answer in
    *'"compute_cap" is not a valid field'*)
        # Drivers before 510.
        answer=$(ask --query-gpu=driver_version,memory.total,memory.used,name)
        code=$?
        answer=$(printf '%s\n' "$answer" | sed 's/,/, [N\/A],/')
        ;;
    esac
    say nvidia_smi.exit "$code"
    if [ "$code" != 0 ]; then
        say nvidia_smi.text "$answer"
        return
    fi
    printf '%s\n' "$answer" | while read -r line; do say gpu "$line"; done
    ask --query-compute-apps=pid,used_memory,process_name |
        while read -r line; do case $line in [0-9]*) say gpu_process "$line" ;; esac done
}

# One line "version path" of each CUDA toolkit and compiler.
cuda() {
    if [ -d /usr/local/cuda ]; then
        version=$(sed -n -e 's/^CUDA Version \([0-9.]*\).*/\1/p' /usr/local/cuda/version.txt \
            2>/dev/null)
        [ -n "$version" ] || version=$(tr -d '\n' 2>/dev/null </usr/local/cuda/version.json |
            sed -n 's/.*"cuda" *: *{[^}]*"version" *: *"\([0-9.]*\)".*/\1/p')
        say cuda "${version:--} $(readlink -f /usr/local/cuda)"
    fi
    nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) &&
        say nvcc "$(limited 3 "$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') $nvcc"
}

network() {
    for name in http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY; do
        eval "value=\${$name:-}"
        # shellcheck disable=SC2154  # eval sets it
        [ -n "$value" ] && say proxy "$name $(bare "$value")"
    done
    say no_proxy "${no_proxy:-${NO_PROXY:-}}"
    for name in PIP_INDEX_URL UV_DEFAULT_INDEX UV_INDEX_URL; do
        eval "value=\${$name:-}"
        [ -n "$value" ] && say pip_index "$(bare "$value") $name"
    done
    for file in "${PIP_CONFIG_FILE:-}" /etc/pip.conf "$HOME/.pip/pip.conf" \
        "$HOME/.config/pip/pip.conf"; do
        [ -r "$file" ] || continue
        sed -n 's/^ *index-url *= *\([^ ]*\).*/\1/p' "$file" |
            while read -r url; do say pip_index "$(bare "$url") $file"; done
    done
    for file in "$HOME/.condarc" /etc/conda/.condarc /opt/conda/.condarc \
        "$HOME/miniconda3/.condarc"; do
        [ -r "$file" ] || continue
        # List items and URLs are what matters: which channels it names.
        urls=$(sed -n -e 's/^ *- *\([^ #]*\).*/\1/p' -e 's/^ *[a-z_-]*: *\(https*:[^ #]*\).*/\1/p' \
            "$file" | while read -r url; do bare "$url"; done | tr '\n' ' ')
        say condarc "$file $urls"
    done
}

programs() {
    found=
    for name in flock tar gzip rsync gcc apt-get curl wget git tmux docker; do
        have "$name" && found="$found $name"
    done
    say tools "${found# }"
    known=' '
    for name in python3 python "$HOME/miniconda3/bin/python" "$HOME/miniforge3/bin/python" \
        /opt/conda/bin/python /root/miniconda3/bin/python /root/miniforge3/bin/python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        case $known in *" $path "*) continue ;; esac
        known="$known$path "
        version=$(limited 3 "$path" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' \
            2>/dev/null) && say python "$version $path"
    done
}

condas() {
    known=' '
    for prefix in "${CONDA_EXE%/bin/conda}" "$HOME/miniconda3" "$HOME/miniforge3" \
        "$HOME/anaconda3" /root/miniconda3 /root/miniforge3 /opt/conda /opt/miniconda3 \
        "$base/miniforge3"; do
        path=$prefix/bin/conda
        [ -n "$prefix" ] && [ -x "$path" ] || continue
        # Ours counts when its installer came to its end.
        [ "$prefix" = "$base/miniforge3" ] && [ ! -e "$prefix/.tunesmith-complete" ] && continue
        case $known in *" $path "*) continue ;; esac
        known="$known$path "
        # The record of the installed package is quicker to read than a Python to start.
        version=
        for record in "$prefix"/conda-meta/conda-[0-9]*.json; do
            [ -e "$record" ] && record=${record##*/conda-} && version=${record%%-*}
        done
        [ -n "$version" ] || version=$(limited 4 "$path" --version 2>/dev/null |
            sed -n 's/.* \([0-9][0-9.]*\).*/\1/p')
        say conda "${version:--} $path"
    done
}

# Every login pays for it; one platform's hook cost 181 s.
bashrc() {
    have bash && [ -r "$HOME/.bashrc" ] || return
    began=$(ticks)
    limited 4 bash -ic exit >/dev/null 2>&1
    say bashrc_seconds "$(seconds "$began")"
}

# outcome_of CODE: what an HTTP status means here; redirects were followed.
outcome_of() {
    case $1 in
    2??) echo ok ;;
    *) echo http ;;
    esac
}

with_curl() {
    set -- "$1" -g -sS -L -o /dev/null --max-time 4 -w '%{http_code}'
    code=$(curl "$@" -I 2>/dev/null)
    failed=$?
    case $failed:$code in
    0:403 | 0:405 | 0:501)
        # Some do not answer HEAD.
        code=$(curl "$@" -r 0-0 2>/dev/null)
        failed=$?
        ;;
    esac
    case $failed in
    0) outcome=$(outcome_of "$code") ;;
    5 | 97) outcome=proxy ;;
    6) outcome=dns ;;
    7) outcome=refused ;;
    28) outcome=timeout ;;
    35 | 51 | 58 | 59 | 60 | 77 | 83) outcome=tls ;;
    *) outcome=failed ;;
    esac
}

with_wget() {
    set -- -S --spider -t 1 -T 4 "$1"
    [ -n "$authorities" ] && set -- --ca-certificate="$authorities" "$@"
    answer=$(limited 4 wget "$@" 2>&1)
    failed=$?
    code=$(printf '%s\n' "$answer" | sed -n 's/^ *HTTP\/[0-9.]* \([0-9][0-9]*\).*/\1/p' | sed -n '$p')
    case $failed:$code:$answer in
    0:*) outcome=ok ;;
    5:*) outcome=tls ;;
    *:[1-5]??:*) outcome=$(outcome_of "$code") ;;
    *'nable to resolve'*) outcome=dns ;;
    *refused*) outcome=refused ;;
    137:* | *'timed out'*) outcome=timeout ;;
    *) outcome=failed ;;
    esac
}

with_python() {
    answer=$(limited 6 "$2" -I - "$1" 2>/dev/null <<'END'
import socket, ssl, sys
from urllib import error, request
try:
    with request.urlopen(request.Request(sys.argv[1], method="HEAD"), timeout=4) as answer:
        print("ok", answer.status)
except error.HTTPError as problem:
    print("http", problem.code)
except (error.URLError, OSError) as problem:
    reason = getattr(problem, "reason", problem)
    names = {ssl.SSLError: "tls", socket.gaierror: "dns", socket.timeout: "timeout"}
    names[ConnectionRefusedError] = "refused"
    print(next((name for kind, name in names.items() if isinstance(reason, kind)), "failed"), "-")
END
    )
    outcome=${answer%% *}
    code=${answer#* }
}

# fetch NUMBER KIND URL: one line "number kind outcome status seconds url".
fetch() {
    began=$(ticks)
    code=
    if have curl; then
        with_curl "$3"
    elif wget --version 2>/dev/null | grep -q GNU; then
        # BusyBox's checks no certificate and fails at many: it would tell nothing.
        with_wget "$3"
    else
        for name in python3 python "$HOME/miniconda3/bin/python" /opt/conda/bin/python \
            /root/miniconda3/bin/python /nowhere; do
            path=$(command -v "$name") && break
        done
        if [ -n "$path" ]; then with_python "$3" "$path"; else outcome=no_tool; fi
    fi
    case $code in '' | 000) code=- ;; esac
    say mirror "$1 $2 ${outcome:-failed} $code $(seconds "$began") $3"
}

mirrors() {
    authorities=
    if [ -n "${TUNESMITH_PROBE_CA:-}" ]; then
        for folder in /dev/shm "${TMPDIR:-/tmp}"; do
            authorities=$(mktemp "$folder/tunesmith.XXXXXX" 2>/dev/null) && break
        done
        printf '%s\n' "$TUNESMITH_PROBE_CA" >"$authorities"
        CURL_CA_BUNDLE=$authorities
        SSL_CERT_FILE=$authorities
        export CURL_CA_BUNDLE SSL_CERT_FILE
    fi
    if [ -n "${TUNESMITH_PROBE_PROXY:-}" ]; then
        http_proxy=$TUNESMITH_PROBE_PROXY
        https_proxy=$TUNESMITH_PROBE_PROXY
        export http_proxy https_proxy
    fi
    set -f
    number=0
    for word in ${TUNESMITH_PROBE_URLS:-}; do
        number=$((number + 1))
        fetch "$number" "${word%%=*}" "${word#*=}" &
    done
    wait
    [ -n "$authorities" ] && rm -f "$authorities"
}

main() {
    say tunesmith_probe 1
    say epoch "$(date +%s)"
    start=$(ticks)
    mirrors &
    gpu &
    bashrc &
    system
    limits
    disks
    condas &
    [ -e "$root/etc/network_turbo" ] && say network_turbo yes
    cuda
    network
    programs
    wait
    say end "$(seconds "$start")"
}

main </dev/null
