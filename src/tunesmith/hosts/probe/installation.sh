# shellcheck shell=sh
# shellcheck disable=SC2154  # common.sh and places.sh set what is not set here
# Sections environments, provisioned, installation: what of ours is there, and how far it came.
#
#   TUNESMITH_PROBE_ENVIRONMENT  name of the conda environment that provisioning makes

# The folder, a tab, and its finish marker where it was finished.
section_environments() {
    for folder in "$base"/envs/*/; do
        [ -d "$folder" ] || continue
        marker=$(cat "$folder$TUNESMITH_PROBE_MARKER" 2>/dev/null)
        say environment "${folder%/}	$marker"
    done
}

# What the last provisioning wrote down for jobs.
section_provisioned() {
    [ -n "$provisioned" ] || return
    say fingerprint "$(sed -n 's/.*"fingerprint": "\(.*\)".*/\1/p' "$provisioned/state.json")"
    [ ! -f "$provisioned/mirror.yml" ] || say mirror_file "$provisioned/mirror.yml"
    # shellcheck source=/dev/null  # a subshell: its variables are for jobs
    say hf_home "$(. "$provisioned/env.sh" && printf '%s' "$HF_HOME")"
}

digest() { sha256sum | cut -d ' ' -f 1; }

# What provisioning has to make, wait for, or leave alone.
section_installation() {
    for folder in "$base" "$base/cache" "$base/data" "$base/models" "$base/runs" "$hf_cache"; do
        [ -d "$folder" ] || say absent "$folder"
    done
    # A folder that was there before us may be open to others: it is made again, closed.
    [ ! -d "$base" ] || [ "$(stat -c %a "$base")" = 700 ] || say absent "$base"

    # How far an environment is: a finish marker, else what the steps before it left.
    own=$base/envs/${TUNESMITH_PROBE_ENVIRONMENT:?}
    if [ -x "$own/bin/python" ]; then
        for file in "$own"/.tunesmith-installed-*; do
            [ -e "$file" ] && say installed "${file##*.tunesmith-installed-}"
        done
        [ -e "$own/.tunesmith-fresh" ] && say fresh yes
        for file in "$own"/lib/python*/site-packages/tunesmith.pth; do
            [ -e "$file" ] && say app "$(cat "$file")"
        done
    fi
    if [ ! -s "$own/$TUNESMITH_PROBE_MARKER" ] && [ -d "$base" ]; then
        say used_kib "$(du -ck "$base/cache" "$base/envs" 2>/dev/null | sed -n '$s/[^0-9].*//p')"
    fi
    if [ -d "$own" ]; then
        say busy "$(find /proc/[0-9]*/exe -maxdepth 0 -lname "$own/*" 2>/dev/null |
            cut -d / -f 3 | tr '\n' ' ')"
    fi
    # .lock: an installation; .fetch.lock: the packages for one are being downloaded.
    for lock in "$base/.lock" "$base/.fetch.lock"; do
        if [ -e "$lock" ] && have flock && ! flock -n "$lock" true; then
            say locked "$lock"
        fi
    done
    if sed -n '/^envs_dirs:/,/^[a-z]/p' "$HOME/.condarc" 2>/dev/null |
        grep -qF -- "$base/envs"; then
        say registered yes
    fi

    # What of ours is written in files: in a start file, the block between our marks.
    for file in "$base/ca.pem" "$base/env.sh" "$base/mirror.yml"; do
        [ -f "$file" ] && say digest "$(digest <"$file") $file"
    done
    for file in "$HOME/.bashrc" "$HOME/.profile" "$HOME/.bash_login" "$HOME/.bash_profile"; do
        ours=$(sed -n '/^# BEGIN tunesmith /,/^# END tunesmith /p' "$file" 2>/dev/null)
        say digest "$(printf '%s\n' "$ours" | digest) $file"
    done
}
