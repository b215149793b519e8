# shellcheck shell=sh
# Made by tunesmith's stand-in for conda: defines the function `conda` for POSIX shells.
export CONDA_EXE='__PREFIX__/bin/conda'
export CONDA_PYTHON_EXE='__PREFIX__/bin/python'

conda() {
	case "${1:-}" in
	activate | deactivate | reactivate)
		__conda_words=$("$CONDA_EXE" shell.posix "$@") || return
		eval "$__conda_words"
		hash -r
		;;
	*)
		"$CONDA_EXE" "$@"
		;;
	esac
}

if [ -z "${CONDA_SHLVL+there}" ]; then
	export CONDA_SHLVL=0
	export PATH='__PREFIX__/condabin'"${PATH:+:$PATH}"
fi
