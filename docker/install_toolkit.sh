#!/bin/sh
# Installs nvcc and its headers: sh install_toolkit.sh CUDA PACKAGES_SH
#
# CUDA is a flavour's, as in 12.8. The packages are NVIDIA's, whose list the default base has.
set -eu
cuda=$1 packages=$2
release=$(echo "$cuda" | tr . -)

APT_MIRRORS=''
# shellcheck source=/dev/null
[ ! -e /run/secrets/mirror ] || . /run/secrets/mirror
[ ! -e /run/secrets/ca ] || export SSL_CERT_FILE=/run/secrets/ca
if ! ls /etc/apt/sources.list.d/cuda* >/dev/null 2>&1; then
    echo "this base has no package list of NVIDIA's; the default one of configs/stack.yml has" >&2
    exit 1
fi
# shellcheck disable=SC2086 # addresses hold no spaces
sh "$packages" "g++ make cuda-nvcc-$release cuda-cudart-dev-$release" $APT_MIRRORS
