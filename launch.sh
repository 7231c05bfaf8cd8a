#!/usr/bin/env bash
# Everything from one line. Makes .venv and installs on the first call; every step goes on where it stopped.
#
#   ./launch.sh demo                            train both stages on the built-in digits and sample
#   ./launch.sh test [pytest args]              run the tests
#   ./launch.sh configs/X.yaml [key=value ...]  stage 1 -> latents -> stage 2 -> samples
#
# One GPU or none: plain python. Several GPUs: all of them, through accelerate. Your own launcher settings:
#   ACCELERATE_ARGS="--num_processes 8 --multi_gpu" ./launch.sh configs/X.yaml
#   SLURM: srun --nodes 2 --ntasks-per-node 1 bash -c 'ACCELERATE_ARGS="--multi_gpu --num_machines 2 --num_processes 16 \
#     --machine_rank $SLURM_NODEID --main_process_ip $HEAD_NODE --main_process_port 29500" ./launch.sh configs/X.yaml'
# PYTHON=python3.12 chooses the interpreter that .venv is made of.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"
python="$venv/bin/python"

install() {
    local wanted
    wanted=$(cat "$here/pyproject.toml" "$here/configs/constraints.txt" | cksum)
    [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted $here" ] && return
    echo "installing into $venv (once; some minutes)"
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$here[all]" --constraint "$here/configs/constraints.txt"
    echo "$wanted $here" >"$venv/.installed"
}

launch() { # one step of a recipe, in as many processes as the machine or ACCELERATE_ARGS says
    local gpus
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    if [ -z "${ACCELERATE_ARGS:-}" ] && [ "$gpus" -le 1 ]; then
        "$python" "$@"
    else
        # shellcheck disable=SC2086  # the arguments are words
        "$venv/bin/accelerate" launch ${ACCELERATE_ARGS:---multi_gpu --num_machines 1 --num_processes $gpus --mixed_precision no --dynamo_backend no} "$@"
    fi
}

recipe() { # configs/X.yaml [key=value ...]
    local config=$1 plan run stages
    shift
    plan=$("$python" -m shared.recipe "$config" "$@")
    read -r stages run <<<"$plan"
    launch "$here/stage1_vae/train.py" --config "$config" "$@"
    if [ "$stages" = both ]; then
        launch "$here/stage1_vae/encode.py" --run "$run"
        launch "$here/stage2_diffusion/train.py" --config "$config" "$@"
    fi
    "$python" -m shared.generate --run "$run"
    echo "pictures: $run/samples/grid.png, $run/stage1_vae/previews/"
}

case "${1:-}" in
demo)
    install
    recipe "$here/configs/digits.yaml" "${@:2}"
    ;;
test)
    install
    cd "$here"
    exec "$python" -m pytest "${@:2}"
    ;;
"" | -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    ;;
*)
    install
    recipe "$@"
    ;;
esac
