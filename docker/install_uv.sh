#!/bin/sh
# Installs uv in /uv, with the version and hashes of the control lock (/control.txt):
# sh install_uv.sh PYTHON PACKAGES_SH
set -eu
python=$1 packages=$2
APT_MIRRORS='' PYPI_INDEXES=''
# shellcheck source=/dev/null
[ ! -e /run/secrets/mirror ] || . /run/secrets/mirror
[ ! -e /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONFIG_FILE=/dev/null

# Debian and Ubuntu keep ensurepip in a package of its own.
if ! "$python" -I -c 'import ensurepip' 2>/dev/null; then
    # shellcheck disable=SC2086 # addresses hold no spaces
    sh "$packages" "$python-venv" $APT_MIRRORS
fi
"$python" -I -m venv /uv
sed -n '/^uv==/,/[^\\]$/p' /control.txt >/tmp/uv.txt
for index in ${PYPI_INDEXES:-https://pypi.org/simple}; do
    /uv/bin/pip install --quiet --no-cache-dir --require-hashes --no-deps \
        --only-binary :all: --index-url "$index" --requirement /tmp/uv.txt && exit
    echo "$index did not do" >&2
done
exit 1
