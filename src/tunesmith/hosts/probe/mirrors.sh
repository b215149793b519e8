# shellcheck shell=sh
# Section mirrors: addresses, tried in parallel.
#
#   TUNESMITH_PROBE_URLS   words "kind=url"
#   TUNESMITH_PROBE_PROXY  HTTP proxy for those
#   TUNESMITH_PROBE_CA     PEM text of the authorities to trust for those

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
        path=$(interpreters | sed 1q)
        if [ -n "$path" ]; then with_python "$3" "$path"; else outcome=no_tool; fi
    fi
    case $code in '' | 000) code=- ;; esac
    say mirror "$1 $2 ${outcome:-failed} $code $(seconds "$began") $3"
}

section_mirrors() {
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
