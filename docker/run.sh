#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# docker run with the devices, mounts and limits that a device needs. Sources of every line: docker/README.md.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: docker/run.sh [--dry-run] [-o ENGINE_OPTION]... DEVICE [COMMAND...]

Runs COMMAND (default: llm-adapt doctor) in the image llm-adapt:DEVICE, with the current folder at /workspace.

  DEVICE              cpu | cuda | ascend (or npu) | mlu | dcu
  --dry-run           print the command instead of running it
  -o ENGINE_OPTION    one more word for `docker run`; repeat it for more
  -h, --help          this text

environment:
  IMAGE               image to run instead of llm-adapt:DEVICE
  ENGINE              docker (default) or podman
  LLM_ADAPT_*         handed to the container, and so are the variables that choose devices:
                      CUDA_, ASCEND_RT_, CN_, MLU_, HIP_ and HCU_VISIBLE_DEVICES, each where it is read

examples:
  docker/run.sh cpu                                              # llm-adapt doctor
  docker/run.sh cuda llm-adapt run --nproc 8 pretrain.py --bf16
  ASCEND_RT_VISIBLE_DEVICES=0,1 docker/run.sh ascend llm-adapt run --nproc 2 pretrain.py
  docker/run.sh -o --volume=/data:/data mlu python train.py      # one word: -o --volume=/data:/data
  ENGINE=podman IMAGE=localhost/llm-adapt:dcu docker/run.sh --dry-run dcu bash
USAGE
}

fail() { # fail STATUS ASKED FOUND DO
    printf 'run.sh: asked: %s\n        found: %s\n        do:    %s\n' "$2" "$3" "$4" >&2
    exit "$1"
}

# HOST_ROOT stands before every path that is looked up, never before one that is printed: for tests.
on_host() { [ -e "${HOST_ROOT:-}$1" ]; }

add() { command_line+=("$@"); }

# add_devices REQUIRED PATTERN...: --device for each existing node; 1 when REQUIRED and none exists.
add_devices() {
    local required=$1 pattern node found=no
    shift
    for pattern in "$@"; do
        while IFS= read -r node; do
            add --device "${node#"${HOST_ROOT:-}"}"
            found=yes
        done < <(compgen -G "${HOST_ROOT:-}$pattern" | sort -V)
    done
    if [ "$required" = required ] && [ "$found" = no ]; then
        missing_devices="$*"
    fi
}

# add_mount PATH [OPTIONS]: bind mount at the same path, where the host has it.
add_mount() {
    if on_host "$1"; then
        add --volume "$1:$1${2:+:$2}"
    fi
}

add_variables() {
    local name
    for name in "$@"; do
        if [ -n "${!name+set}" ]; then
            add --env "$name"
        fi
    done
}

# The vendors' lines give --shm-size beside --ipc=host. Docker ignores it then; podman refuses the pair
# (podman pull request 15810).
add_host_ipc() {
    add --ipc=host
    if [ "$engine_name" != podman ]; then
        add --shm-size="$1"
    fi
}

configure_cpu() {
    # DataLoader workers and gloo need more than the 64 MB of shared memory that engines give.
    add --shm-size=8g
    # The caller's user, so that files written to /workspace are the caller's. That user has no entry in the
    # image's passwd: torch asks getpass for a name, and caches need a home.
    add --user "$(id -u):$(id -g)" --env USER=trainer --env HOME=/tmp
    if [ "$engine_name" = podman ] && [ "$(id -u)" != 0 ]; then
        add --userns=keep-id
    fi
}

configure_cuda() {
    # podman leaves --gpus to docker and takes the devices of the Container Device Interface.
    if [ "$engine_name" = podman ]; then
        add --device nvidia.com/gpu=all --security-opt=label=disable
    else
        add --gpus all
    fi
    add --ipc=host --ulimit memlock=-1 --ulimit stack=67108864
    add_variables CUDA_VISIBLE_DEVICES
}

configure_ascend() {
    add --network=host
    add_host_ipc 32g
    add_devices required '/dev/davinci[0-9]*'
    # The vendor's line for the 950 has ummu and uburma in place of devmm_svm.
    add_devices optional /dev/davinci_manager /dev/devmm_svm /dev/hisi_hdc /dev/ummu /dev/uburma
    add_mount /usr/local/dcmi
    add_mount /usr/local/bin/npu-smi
    add_mount /usr/local/Ascend/driver/lib64
    add_mount /usr/local/Ascend/driver/version.info
    add_mount /usr/local/Ascend/driver/tools/hccn_tool
    add_mount /etc/ascend_install.info
    add_variables ASCEND_RT_VISIBLE_DEVICES
}

configure_mlu() {
    add --network=host
    add_host_ipc 64g
    add --ulimit memlock=-1 --cap-add=SYS_PTRACE --security-opt seccomp=unconfined
    add_devices required '/dev/cambricon_dev[0-9]*'
    add_devices optional /dev/cambricon_ctl
    add_mount /usr/bin/cnmon ro
    # CN_VISIBLE_DEVICES goes before MLU_VISIBLE_DEVICES in the vendor's runtime.
    add_variables CN_VISIBLE_DEVICES MLU_VISIBLE_DEVICES
}

configure_dcu() {
    local name value="" source=""
    add --network=host
    add_host_ipc 64G
    add --group-add video --cap-add=SYS_PTRACE --security-opt seccomp=unconfined --ulimit memlock=-1:-1
    add_devices required /dev/kfd
    add_devices optional /dev/mkfd /dev/dri # mkfd: newer drivers only
    add_mount /opt/hyhal ro
    # The runtime reads all three variables; when they differ, ranks see different devices than they think.
    for name in HIP_VISIBLE_DEVICES HCU_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; do
        if [ -n "${!name+set}" ]; then
            if [ -n "$source" ] && [ "$value" != "${!name}" ]; then
                fail 2 "$name='${!name}'" "$source='$value', and the runtime reads both" \
                    "set one of HIP_, HCU_ and CUDA_VISIBLE_DEVICES, or all to the same devices"
            fi
            value=${!name}
            source=$name
        fi
    done
    if [ -n "$source" ]; then # also an empty list: no device
        add --env "HIP_VISIBLE_DEVICES=$value" --env "HCU_VISIBLE_DEVICES=$value" --env "CUDA_VISIBLE_DEVICES=$value"
    fi
}

# launch: run command_line, or print it; a missing device ends a real run.
launch() {
    if [ "$dry_run" = yes ]; then
        if [ -n "$missing_devices" ]; then
            echo "run.sh: note: this host has no $missing_devices; a real run would stop here" >&2
        fi
        printf '%q ' "${command_line[@]}"
        echo
        return
    fi
    if [ -n "$missing_devices" ]; then
        fail 1 "a container with the $device devices" "no $missing_devices on this host" \
            "install the driver, or run on a host that has the device; --dry-run prints the command"
    fi
    if ! command -v "$engine" > /dev/null; then
        fail 1 "engine $engine" "no such command" "install docker, or set ENGINE=podman"
    fi
    exec "${command_line[@]}"
}

main() {
    local -a engine_options=()
    dry_run=no
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --dry-run) dry_run=yes; shift ;;
            -o)
                [ $# -ge 2 ] || fail 2 "-o" "no word after it" "give one option of the engine, e.g. -o --volume=/data:/data"
                engine_options+=("$2")
                shift 2
                ;;
            -*) fail 2 "option $1" "unknown; known: --dry-run, -o ENGINE_OPTION, --help" "options of the engine go behind -o" ;;
            *) break ;;
        esac
    done
    device=${1:-}
    case $device in
        cpu | cuda | ascend | mlu | dcu) shift ;;
        npu) device=ascend; shift ;; # its name inside llm-adapt
        *) fail 2 "device '$device'" "no such device" \
            "choose one of: cpu cuda ascend mlu dcu (docker/run.sh --help shows examples)" ;;
    esac

    engine=${ENGINE:-docker}
    engine_name=$(basename "$engine")
    missing_devices=""
    command_line=("$engine" run --rm --interactive)
    if [ -t 0 ] && [ -t 1 ]; then
        add --tty
    fi
    if [ "$engine_name" != podman ]; then
        add --init # python as process 1 would ignore SIGTERM; podman needs a further program for it
    fi
    "configure_$device"
    # shellcheck disable=SC2086  # names of variables hold no spaces
    add_variables ${!LLM_ADAPT_@}
    add --volume "$PWD:/workspace" --workdir /workspace
    if [ -z "${IMAGE:-}" ]; then
        add --pull=never # llm-adapt:DEVICE is built here, not fetched from a registry
    fi
    # The ${x[@]+...} form: bash before 4.4 calls an empty array unbound.
    add ${engine_options[@]+"${engine_options[@]}"} "${IMAGE:-llm-adapt:$device}" "$@"
    launch
}

main "$@"
