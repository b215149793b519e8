#!/bin/sh
# Prints what provision has to know about a host, one key=value a line. Changes nothing.
#
# sh probe.sh BASE ENVIRONMENT COMMANDS DATA_DISK...
# BASE is tunesmith's folder, empty to find it; COMMANDS are separated by spaces.
export LC_ALL=C
base=$1 name=$2 commands=$3
shift 3

say() { printf '%s=%s\n' "$1" "$2"; }

# The first data disk of its own that we can write to, else the first such folder.
data_disk=
folder=
for disk in "$@"; do
    if [ -d "$disk" ] && [ -w "$disk" ]; then
        folder=${folder:-$disk}
        if awk -v disk="$disk" '$2 == disk { found = 1 } END { exit !found }' /proc/mounts; then
            data_disk=$disk
            break
        fi
    fi
done
data_disk=${data_disk:-${folder:-$HOME}}
if [ -n "$base" ]; then data_disk=${base%/*}; else base=$data_disk/tunesmith; fi
environment=$base/envs/$name

say home "$HOME"
say uid "$(id -u)"
say architecture "$(uname -m)"
say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/^glibc //')"
say epoch "$(date +%s)"
say data_disk "${data_disk:-/}"
say base "$base"

there=$base
while [ ! -d "$there" ]; do there=${there%/*}; there=${there:-/}; done
[ -w "$there" ] && say writable 1
say free_kib "$(df -Pk "$there" | awk 'END { print $4 }')"
say inodes "$(df -Pi "$there" 2>/dev/null | awk 'END { print $2 }')"
say free_inodes "$(df -Pi "$there" 2>/dev/null | awk 'END { print $4 }')"

for folder in "$base" "$base/cache" "$base/data" "$base/models" "$base/runs" \
    "$data_disk/Hugging-Face"; do
    [ -d "$folder" ] || say absent "$folder"
done
# A folder that was there before us may be open to others: it is made again, closed.
[ ! -d "$base" ] || [ "$(stat -c %a "$base")" = 700 ] || say absent "$base"

# How far an environment is: a finish marker, else what the steps before it left.
if [ -x "$environment/bin/python" ]; then
    if [ -s "$environment/.tunesmith-environment.json" ]; then
        say marker "$(tr -d '\n' <"$environment/.tunesmith-environment.json")"
    fi
    for file in "$environment"/.tunesmith-installed-*; do
        [ -e "$file" ] && say installed "${file##*.tunesmith-installed-}"
    done
    [ -e "$environment/.tunesmith-fresh" ] && say fresh 1
    for file in "$environment"/lib/python*/site-packages/tunesmith.pth; do
        [ -e "$file" ] && say app "$(cat "$file")"
    done
fi
if [ ! -s "$environment/.tunesmith-environment.json" ] && [ -d "$base" ]; then
    say used_kib "$(du -ck "$base/cache" "$base/envs" 2>/dev/null | awk 'END { print $1 }')"
fi
if [ -d "$environment" ]; then
    say busy "$(find /proc/[0-9]*/exe -maxdepth 0 -lname "$environment/*" 2>/dev/null |
        cut -d / -f 3 | tr '\n' ' ')"
fi
# .lock: an installation; .fetch.lock: the packages for one are being downloaded.
for lock in "$base/.lock" "$base/.fetch.lock"; do
    if [ -e "$lock" ] && command -v flock >/dev/null && ! flock -n "$lock" true; then
        say locked "$lock"
    fi
done

# The conda that is there; ours counts only when its installer came to its end.
ours=$base/miniforge3
for root in "${CONDA_EXE%/bin/conda}" "$HOME/miniconda3" "$HOME/miniforge3" "$HOME/anaconda3" \
    /root/miniconda3 /root/miniforge3 /opt/conda /opt/miniconda3 "$ours"; do
    [ -n "$root" ] && [ -x "$root/bin/conda" ] || continue
    [ "$root" != "$ours" ] || [ -e "$ours/.tunesmith-complete" ] || continue
    say conda "$root/bin/conda"
    break
done
[ -e "$ours" ] && say miniforge 1
if sed -n '/^envs_dirs:/,/^[a-z]/p' "$HOME/.condarc" 2>/dev/null | grep -qF -- "$base/envs"; then
    say registered 1
fi

for command in $commands; do
    command -v "$command" >/dev/null || say missing "$command"
done
[ -e /usr/include/stdlib.h ] || say missing stdlib.h
command -v apt-get >/dev/null && say apt 1
[ "$(id -u)" != 0 ] && sudo -n true 2>/dev/null && say sudo 1

login=.profile
for file in .bash_login .bash_profile; do
    [ -e "$HOME/$file" ] && login=$file
done
say login "$HOME/$login"

# What of ours is written in files: in a start file, the block between our marks.
digest() { sha256sum | cut -d ' ' -f 1; }
for file in "$base/ca.pem" "$base/env.sh" "$base/mirror.yml"; do
    [ -f "$file" ] && say digest "$(digest <"$file") $file"
done
for file in "$HOME/.bashrc" "$HOME/$login"; do
    ours=$(sed -n '/^# BEGIN tunesmith /,/^# END tunesmith /p' "$file" 2>/dev/null)
    say digest "$(printf '%s\n' "$ours" | digest) $file"
done

for toolkit in "$base"/cuda-* /usr/local/cuda; do
    [ -x "$toolkit/bin/nvcc" ] || continue
    [ "$toolkit" = /usr/local/cuda ] || [ -e "$toolkit/.tunesmith-complete" ] || continue
    say toolkit "$toolkit $("$toolkit/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
done
# As in doctor/probe.sh: a login without a terminal may lack its folder on PATH.
for smi in nvidia-smi /usr/bin/nvidia-smi /usr/local/bin/nvidia-smi \
    /usr/local/nvidia/bin/nvidia-smi /usr/lib/wsl/lib/nvidia-smi; do
    command -v "$smi" >/dev/null || continue
    timeout 30 "$smi" --query-gpu=driver_version,compute_cap,name --format=csv,noheader 2>&1 |
        sed 's/^/gpu=/'
    break
done
exit 0
