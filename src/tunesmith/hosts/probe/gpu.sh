# shellcheck shell=sh
# shellcheck disable=SC2154  # common.sh and places.sh set what is not set here
# Sections gpu, gpu_use, cuda.

# Sets $smi: nvidia-smi, wherever it is: a login without a terminal may lack its folder on PATH.
find_smi() {
    for place in nvidia-smi /usr/bin/nvidia-smi /usr/local/bin/nvidia-smi \
        /usr/local/nvidia/bin/nvidia-smi /usr/lib/wsl/lib/nvidia-smi; do
        smi=$(command -v "$place" 2>/dev/null) && return
    done
    smi=
    return 1
}

# ask_smi QUERY: a driver that hangs must not hang us; one that wakes eight GPUs takes seconds.
ask_smi() { limited 20 "$smi" "$1" --format=csv,noheader; }

section_gpu() {
    sed -n 's/^NVRM version:.* \([0-9][0-9]*\.[0-9.]*\) .*/\1/p' \
        "$root/proc/driver/nvidia/version" 2>/dev/null | lines kernel_module
    [ -e "$root/dev/kfd" ] && say other_accelerator AMD
    [ -e "$root/dev/davinci0" ] && say other_accelerator Ascend
    find_smi || return
    say nvidia_smi "$smi"
    answer=$(ask_smi --query-gpu=driver_version,compute_cap,memory.total,memory.used,name 2>&1)
    code=$?
    case $answer in
    *'"compute_cap" is not a valid field'*)
        # Drivers before 510.
        answer=$(ask_smi --query-gpu=driver_version,memory.total,memory.used,name 2>&1)
        code=$?
        answer=$(printf '%s\n' "$answer" | sed 's/,/, [N\/A],/')
        ;;
    esac
    case $code in
    0) printf '%s\n' "$answer" | lines gpu ;;
    137) say nvidia_smi.text 'no answer within 20 s' ;;
    *) say nvidia_smi.text "${answer:-exit code $code}" ;;
    esac
}

section_gpu_use() {
    find_smi || return
    ask_smi --query-compute-apps=pid,used_memory,process_name 2>/dev/null | sed -n '/^[0-9]/p' |
        lines gpu_process
}

# nvcc_version PATH
nvcc_version() { limited 3 "$1" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'; }

# One line "version path" of each CUDA and compiler; `toolkit` has those that provisioning takes.
section_cuda() {
    if [ -d /usr/local/cuda ]; then
        version=$(sed -n -e 's/^CUDA Version \([0-9.]*\).*/\1/p' /usr/local/cuda/version.txt \
            2>/dev/null)
        [ -n "$version" ] || version=$(tr -d '\n' 2>/dev/null </usr/local/cuda/version.json |
            sed -n 's/.*"cuda" *: *{[^}]*"version" *: *"\([0-9.]*\)".*/\1/p')
        folder=$(readlink -f /usr/local/cuda)
        say cuda "${version:--} ${folder:-/usr/local/cuda}"
    fi
    nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc) &&
        version=$(nvcc_version "$nvcc") && say nvcc "${version:--} $nvcc"
    for toolkit in "$base"/cuda-* /usr/local/cuda; do
        [ -x "$toolkit/bin/nvcc" ] || continue
        [ "$toolkit" = /usr/local/cuda ] || [ -e "$toolkit/.tunesmith-complete" ] || continue
        version=$(nvcc_version "$toolkit/bin/nvcc")
        say toolkit "${version:--} $toolkit"
    done
}
