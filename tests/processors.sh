#!/usr/bin/env bash
# The tests that compute, as on an old, a usual and a new processor: sums must not depend on which
# instructions a library picks. Not part of CI: `tests/processors.sh`, three to ten minutes;
# `tests/processors.sh --models` takes the merges and proofs of real models too.
set -euo pipefail
cd "$(dirname "$0")/.."

tests=(
	tests/unit/test_streaming_merge.py tests/unit/test_export.py tests/unit/test_adapter.py
	tests/unit/test_merge_guards.py tests/unit/test_pull_merge_here.py tests/unit/test_proof_limits.py
	tests/unit/test_report_curve.py tests/unit/test_dataset_looks.py tests/unit/test_answering.py
)
if [ "${1:-}" = --models ]; then
	tests+=(tests/e2e/test_training_side.py)
fi

# Of OpenBLAS (NumPy), MKL (torch), ATen (torch) and oneDNN (torch); the flag such a processor has.
kinds=(
	"Nehalem SSE4_2 default SSE41 sse4_2"
	"Haswell AVX2 avx2 AVX2 avx2"
	"SkylakeX AVX512 avx512 AVX512_CORE avx512f"
)
for kind in "${kinds[@]}"; do
	read -r openblas mkl aten onednn flag <<<"$kind"
	if ! grep -qw "$flag" /proc/cpuinfo; then
		echo "--- $openblas: left out, this processor has no $flag"
		continue
	fi
	echo "--- $openblas"
	OPENBLAS_CORETYPE=$openblas MKL_ENABLE_INSTRUCTIONS=$mkl ATEN_CPU_CAPABILITY=$aten \
		ONEDNN_MAX_CPU_ISA=$onednn .venv/bin/python -m pytest -q "${tests[@]}"
done
