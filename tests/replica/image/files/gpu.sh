#!/bin/bash
# A stand-in for nvidia-smi: what it says depends on the word in /etc/replica/gpu.
set -eu

mode=$(cat /etc/replica/gpu)
processes=()
case $mode in
ok) driver=570.124.06 cuda=12.8 gpus=("NVIDIA GeForce RTX 4090|8.9|24564|1") ;;
two) driver=570.124.06 cuda=12.8 gpus=("NVIDIA A100-SXM4-80GB|8.0|81920|4" "NVIDIA A100-SXM4-80GB|8.0|81920|4") ;;
busy)
	driver=570.124.06 cuda=12.8 gpus=("NVIDIA GeForce RTX 4090|8.9|24564|20480")
	processes=("4242|/opt/conda/bin/python|20214")
	;;
middle_driver) driver=535.161.08 cuda=12.2 gpus=("NVIDIA A100-SXM4-80GB|8.0|81920|4") ;;
old_driver) driver=470.82.01 cuda=11.4 gpus=("NVIDIA GeForce RTX 3090|-|24268|0") ;;
blackwell) driver=570.86.10 cuda=12.8 gpus=("NVIDIA GeForce RTX 5090|12.0|32607|2") ;;
blackwell_old_driver) driver=565.57.01 cuda=12.7 gpus=("NVIDIA GeForce RTX 5090|12.0|32607|2") ;;
pascal) driver=535.161.08 cuda=12.2 gpus=("Tesla P40|6.1|24576|0") ;;
mixed) driver=570.124.06 cuda=12.8 gpus=("Tesla V100-SXM2-32GB|7.0|32768|3" "NVIDIA GeForce RTX 4090|8.9|24564|1") ;;
no_gpu)
	echo "No devices were found"
	exit 6
	;;
nvml_error)
	echo "Failed to initialize NVML: Driver/library version mismatch"
	echo "NVML library version: 570.124"
	exit 18
	;;
no_driver)
	echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running."
	echo
	exit 9
	;;
*)
	echo "$0: no mode '$mode'" >&2
	exit 3
	;;
esac

query='' apps='' header=yes units=yes list=no
for word in "$@"; do
	case $word in
	--query-gpu=*) query=${word#*=} ;;
	--query-compute-apps=*) apps=${word#*=} ;;
	--format=*)
		[[ $word == *csv* ]] || exit 2
		[[ $word == *noheader* ]] && header=no
		[[ $word == *nounits* ]] && units=no
		;;
	-L | --list-gpus) list=yes ;;
	-i | --id=*) ;;
	[0-9]*) ;;
	*)
		echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help."
		echo
		exit 2
		;;
	esac
done

unit() { if [ "$units" = yes ]; then echo " $1"; fi; }

# field NAME NUMBER RECORD: one value of one GPU.
field() {
	local name capability total used
	IFS='|' read -r name capability total used <<<"$3"
	case $1 in
	index) echo "$2" ;;
	count) echo "${#gpus[@]}" ;;
	name | gpu_name) echo "$name" ;;
	driver_version) echo "$driver" ;;
	compute_cap)
		if [ "$capability" = - ]; then return 1; fi
		echo "$capability"
		;;
	memory.total) echo "$total$(unit MiB)" ;;
	memory.used) echo "$used$(unit MiB)" ;;
	memory.free) echo "$((total - used))$(unit MiB)" ;;
	uuid | gpu_uuid) printf 'GPU-00000000-0000-0000-0000-%012d\n' "$2" ;;
	pci.bus_id | gpu_bus_id) printf '00000000:%02X:00.0\n' "$((16 + $2))" ;;
	utilization.gpu) echo "0$(unit %)" ;;
	temperature.gpu) echo 31 ;;
	power.draw) echo "21.32$(unit W)" ;;
	ecc.errors.uncorrected.volatile.total) echo "[N/A]" ;;
	*) return 1 ;;
	esac
}

process() {
	local pid name used
	IFS='|' read -r pid name used <<<"$3"
	case $1 in
	pid) echo "$pid" ;;
	name | process_name) echo "$name" ;;
	used_memory | used_gpu_memory) echo "$used$(unit MiB)" ;;
	gpu_uuid) printf 'GPU-00000000-0000-0000-0000-%012d\n' 0 ;;
	gpu_name) echo "${gpus[0]%%|*}" ;;
	gpu_bus_id) echo 00000000:10:00.0 ;;
	*) return 1 ;;
	esac
}

# table FUNCTION FIELDS RECORD...: comma-separated lines.
table() {
	local what=$1 fields number=0 line value
	IFS=', ' read -ra fields <<<"$2"
	shift 2
	for value in "${fields[@]}"; do
		if ! "$what" "$value" 0 "${gpus[0]}" >/dev/null; then
			echo "Field \"$value\" is not a valid field to query."
			echo
			exit 2
		fi
	done
	if [ "$header" = yes ]; then
		line=''
		for value in "${fields[@]}"; do line="$line${line:+, }$value"; done
		echo "$line"
	fi
	for record in "$@"; do
		line=''
		for value in "${fields[@]}"; do
			line="$line${line:+, }$("$what" "$value" "$number" "$record")"
		done
		echo "$line"
		number=$((number + 1))
	done
}

if [ -n "$query" ]; then
	table field "$query" "${gpus[@]}"
elif [ -n "$apps" ]; then
	table process "$apps" ${processes[@]+"${processes[@]}"}
elif [ "$list" = yes ]; then
	for number in "${!gpus[@]}"; do
		echo "GPU $number: ${gpus[number]%%|*} (UUID: $(field uuid "$number" "${gpus[number]}"))"
	done
else
	echo "+-----------------------------------------------------------------------------------------+"
	printf '| NVIDIA-SMI %-23s Driver Version: %-14s CUDA Version: %-8s |\n' "$driver" "$driver" "$cuda"
	echo "+-----------------------------------------------------------------------------------------+"
	for number in "${!gpus[@]}"; do
		printf '| %3s  %-50s %s\n' "$number" "${gpus[number]%%|*}" \
			"$(field memory.used "$number" "${gpus[number]}") / $(field memory.total "$number" "${gpus[number]}") |"
	done
	echo "+-----------------------------------------------------------------------------------------+"
fi
