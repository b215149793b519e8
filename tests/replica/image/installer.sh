#!/bin/sh
# A stand-in for Miniforge's installer, made for tests: header, then a gzip'd tar.
# It has the options of the real one that provisioning uses: -b (no questions), -p PREFIX,
# -f (no error when PREFIX is there), -u (update), -s (skip scripts), -h.
set -eu

prefix=$HOME/miniforge3
batch=no
force=no
while getopts bfhp:su option; do
	case $option in
	b) batch=yes ;;
	f | u) force=yes ;;
	p) prefix=$OPTARG ;;
	s) ;;
	h)
		echo "usage: $0 [-b] [-f] [-p PREFIX] [-s] [-u]"
		exit 0
		;;
	*) exit 2 ;;
	esac
done
if [ "$batch" = no ]; then
	echo "ERROR: this stand-in cannot ask about the licence; say -b" >&2
	exit 2
fi
case $prefix in
*' '*)
	echo "ERROR: Cannot install into directories with spaces" >&2
	exit 1
	;;
esac
if [ "$force" = no ] && [ -e "$prefix" ]; then
	echo "ERROR: File or directory already exists: '$prefix'" >&2
	echo "If you want to update an existing installation, use the -u option." >&2
	exit 1
fi
size=$(wc -c <"$0")
if [ "$size" != __SIZE__ ]; then
	echo "ERROR: size of $0 should be __SIZE__ bytes, it is $size" >&2
	exit 1
fi
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
echo "PREFIX=$prefix"
echo "Unpacking payload ..."
tail -n +__LINES__ "$0" | tar -xzf - --no-same-owner -C "$prefix"
sed -i "s|__PREFIX__|$prefix|g" "$prefix/etc/profile.d/conda.sh" "$prefix/bin/activate"
mkdir -p "$prefix/envs" "$prefix/pkgs"
echo "installation finished."
exit 0
