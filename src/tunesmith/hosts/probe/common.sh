# shellcheck shell=sh
# What every section of the probe uses. The settings stand ahead of this text (script.py).
#
#   TUNESMITH_PROBE_ROOT   folder that stands for / where /proc, /sys, /etc and data disks are
#                          read (tests)

LC_ALL=C
export LC_ALL
# shellcheck disable=SC2034  # for the sections
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

# lines KEY: one line of that key for each line of stdin that is not empty; the last one may lack
# its line feed.
lines() {
    { cat && echo; } | sed -e '/^$/d' -e 's/%/%25/g' -e "s/$cr/%0D/g" -e "s/^/$1=/"
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

# usage PATH [-i]: the line of df about its file system, in KiB (-i: in inodes).
usage() { limited 10 df "-P${2:-k}" "$1" 2>/dev/null | sed 1d; }

# disk KEY PATH: KiB and inodes, total and free; the mount point last, it may hold spaces.
disk() {
    usage "$2" | {
        read -r _ total _ free _ mount || exit
        inodes=$(usage "$2" i | {
            read -r _ count _ left _
            echo "$count $left"
        })
        say "$1" "$total $free ${inodes:-- -} $2|$mount"
    }
}

# prefixes: where a conda may be, the login's own first and that of provisioning last, a line each.
prefixes() {
    printf '%s\n' "${CONDA_EXE%/bin/conda}" "$HOME/miniconda3" "$HOME/miniforge3" \
        "$HOME/anaconda3" /root/miniconda3 /root/miniforge3 /opt/conda /opt/miniconda3 \
        "${base:+$base/miniforge3}" | sed '/^$/d'
}

# interpreters: the Pythons there, a path a line. A conda's comes first: on images such as
# AutoDL's it is the only one.
interpreters() {
    known=' '
    { prefixes | sed 's/$/\/bin\/python/' && printf '%s\n' python3 python; } |
        while read -r name; do
            path=$(command -v "$name" 2>/dev/null) || continue
            case $known in *" $path "*) continue ;; esac
            known="$known$path "
            echo "$path"
        done
}
