# shellcheck shell=sh
# Section findings: what provisioning left on a host, as recorded after the last good run and as
# it is now. provision/record.sh records what `found` prints.

# Start files of shells and of conda that may hold a line of ours. They lie on the system
# disk, which a platform may reset while the data disk stays.
start_files() {
    printf '%s\n' \
        "$HOME/.bashrc" "$HOME/.bash_profile" "$HOME/.bash_login" "$HOME/.profile" \
        "$HOME/.zshenv" "$HOME/.condarc" "$HOME/.conda/.condarc" \
        /etc/environment /etc/bash.bashrc /etc/profile /etc/conda/.condarc \
        /etc/profile.d/*.sh
}

found_gpu() {
    # Driver and name decide which flavour runs.
    find_smi && answer=$(ask_smi --query-gpu=driver_version,name 2>/dev/null) || answer=none
    printf 'gpu=%s\n' "$(printf '%s' "${answer:-none}" | tr '\n' ';')"
}

checksum() { # of stdin
    cksum | tr ' ' -
}

small_things() { # BASE
    printf 'user=%s\n' "$(id -u)"
    printf 'disk=%s\n' "$(usage "$1" | sed 's/^.*% *//')"
    [ -f "$1/env.sh" ] && printf 'file:env.sh=%s\n' "$(checksum <"$1/env.sh")"
    start_files | while IFS= read -r file; do
        [ -f "$file" ] || continue
        ours=$(sed -n '/BEGIN tunesmith/,/END tunesmith/p; /tunesmith/p' "$file" 2>/dev/null)
        [ -n "$ours" ] && printf 'start:%s=%s\n' "$file" "$(printf '%s' "$ours" | checksum)"
    done
    for tool in flock gcc gzip rsync tar; do
        printf 'tool:%s=%s\n' "$tool" "$(command -v "$tool")"
    done
    for environment in "$1"/envs/*/; do
        python=${environment}bin/python
        [ -e "$python" ] || continue
        printf 'python:%s=%s (%s bytes)\n' "${python#"$1"/}" "$("$python" -V 2>&1 | head -n 1)" \
            "$(stat -L -c %s "$python")"
        # The conda that made it, as its history says.
        conda=$(sed -n 's/^# cmd: \(\/[^ ]*\) .*/\1/p' "${environment}conda-meta/history" \
            2>/dev/null | head -n 1)
        [ -n "$conda" ] && [ -x "$conda" ] && printf 'conda=%s\n' "$conda"
    done
}

# One line a part of what we installed: a folder (a package, the standard library) or a file
# that has no folder of its own (a program in bin, a library in lib), so that what a user adds
# is a line of its own, too. With how many files, their bytes, and the sum of their times.
# Bytecode comes and goes; gradio writes its seed at the first import; conda notes in its
# history what a user asks for.
trees() { # BASE
    cd "$1" || return
    set --
    for folder in envs app cuda-*; do
        [ -d "$folder" ] && set -- "$@" "$folder"
    done
    [ $# -gt 0 ] || return 0
    # Folders that several packages share (nvidia, google): no package of their own.
    shared=$(for folder in envs/*/lib/python*/site-packages/*/; do
        case $folder in *-info/ | *'*'*) continue ;; esac
        [ -e "${folder}__init__.py" ] || basename "$folder"
    done | tr '\n' ' ')
    if find . -prune -printf '' 2>/dev/null; then
        find "$@" -name __pycache__ -prune -o ! -type d ! -name hash_seed.txt \
            ! -path '*/conda-meta/history' -printf '%s %T@ %p\n'
    else
        find "$@" -name __pycache__ -prune -o ! -type d ! -name hash_seed.txt \
            ! -path '*/conda-meta/history' -exec stat -c '%s %Y %n' {} +
    fi | awk -v shared=" $shared" '{
        bytes = $1
        time = int($2)
        n = split(substr($0, length($1) + length($2) + 3), part, "/")
        group = part[1] "/" part[2]
        last = part[1] == "envs" ? 3 : 2
        for (i = 3; i < n && i <= last; i++) {
            group = group "/" part[i]
            if (part[i] == "lib" && part[i + 1] ~ /^python/ && i + 1 < n) last = i + 1
            if (part[i] ~ /^python/ && part[i + 1] == "site-packages") last = i + 2
            if (part[i - 1] == "site-packages" && index(shared, " " part[i] " ")) last = i + 1
            if (part[i] == "include" || part[i] == "share") last = i + 1
        }
        if (n == i && part[n - 1] ~ /^(site-packages|bin|lib|conda-meta)$/)
            group = group "/" part[n]
        files[group]++
        size[group] += bytes
        times[group] += time
    }
    END {
        for (group in files)
            printf "tree:%s=%.0f files %.0f bytes %.0f\n",
                group, files[group], size[group], times[group]
    }'
}

# Files of base models whose size is not the one they were proven with. A fetch wrote the
# manifest (basemodel/store.py), one key a line; what is whole has no line, so that models may come
# and go.
broken_models() { # BASE
    for manifest in "$1"/models/*/tunesmith-model.json; do
        [ -f "$manifest" ] || continue
        folder=${manifest%/*}
        elsewhere=$(sed -n 's/^  "path": "\(\/.*\)",$/\1/p' "$manifest")
        awk -F'"' '/^    "[^"]*": \{$/ { name = $2 }
            /^      "size": / { gsub(/[^0-9]/, "", $3); print $3, name }' "$manifest" |
            while read -r size name; do
                now=$(stat -L -c %s "${elsewhere:-$folder}/$name" 2>/dev/null || echo 0)
                [ "$now" = "$size" ] && continue
                printf 'model:%s/%s=%s of %s bytes\n' "${folder##*/}" "$name" "$now" "$size"
            done
    done
}

# found BASE: one line KEY=VALUE a finding.
found() {
    # Programs that a non-interactive login may lack on PATH.
    PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # nvidia-smi, which may take a second, runs beside the rest: its line waits in the pipe.
    found_gpu | {
        small_things "$1"
        trees "$1"
        cat
    } | tr -cd '\012\040-\176' | sort
}

section_findings() {
    [ -n "$provisioned" ] || return
    lines recorded <"$provisioned/state.json"
    { found "$provisioned" && broken_models "$provisioned"; } | lines found
}
