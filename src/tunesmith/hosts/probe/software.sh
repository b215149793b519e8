# shellcheck shell=sh
# shellcheck disable=SC2154  # common.sh and places.sh set what is not set here
# Sections programs, pythons, condas, network, bashrc, engine: what is installed and set there.
#
#   TUNESMITH_PROBE_PROGRAMS  words: the programs to look for

section_programs() {
    found=
    for name in ${TUNESMITH_PROBE_PROGRAMS:-}; do
        have "$name" && found="$found $name"
    done
    say programs "${found# }"
    if [ -e /usr/include/stdlib.h ]; then say c_headers yes; else say c_headers no; fi
}

section_pythons() {
    interpreters | while read -r path; do
        version=$(limited 3 "$path" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' \
            2>/dev/null </dev/null) && say python "$version $path"
    done
}

section_condas() {
    known=' '
    prefixes | while read -r prefix; do
        path=$prefix/bin/conda
        [ -x "$path" ] || continue
        # Ours counts when its installer came to its end.
        [ "$prefix" = "$base/miniforge3" ] && [ ! -e "$prefix/.tunesmith-complete" ] && continue
        case $known in *" $path "*) continue ;; esac
        known="$known$path "
        # The record of the installed package is quicker to read than a Python to start.
        version=
        for record in "$prefix"/conda-meta/conda-[0-9]*.json; do
            [ -e "$record" ] && record=${record##*/conda-} && version=${record%%-*}
        done
        [ -n "$version" ] || version=$(limited 4 "$path" --version 2>/dev/null </dev/null |
            sed -n 's/.* \([0-9][0-9.]*\).*/\1/p')
        say conda "${version:--} $path"
    done
}

section_network() {
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
    [ -e "$root/etc/network_turbo" ] && say network_turbo yes
}

# Every login pays for it; one platform's hook cost 181 s.
section_bashrc() {
    have bash && [ -r "$HOME/.bashrc" ] || return
    began=$(ticks)
    limited 4 bash -ic exit >/dev/null 2>&1
    say bashrc_seconds "$(seconds "$began")"
}

# Each image on a line: its id, and its layers.
section_engine() {
    if ! have docker; then
        say engine absent
        return
    fi
    if ! fault=$(limited 60 docker version --format '{{.Server.Version}}' 2>&1 >/dev/null); then
        say engine silent
        say engine.fault "$fault"
        return
    fi
    say engine answers
    form='{{.Id}} {{range .RootFS.Layers}}{{.}} {{end}}'
    docker image ls -q --no-trunc | sort -u | xargs -r docker image inspect --format "$form" |
        lines image
}
