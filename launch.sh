#!/usr/bin/env bash
# Everything from one line. Makes .venv and installs on the first call; every step goes on where it stopped.
#
#   ./launch.sh demo                            train both stages on the built-in digits and sample
#   ./launch.sh test [pytest args]              run the tests
#   ./launch.sh SOURCE [--minutes M] [key=value ...]   plan a recipe for a folder, a file or a hub id, and run it
#   ./launch.sh configs/X.yaml [key=value ...]  stage 1 -> latents -> stage 2 -> samples -> report
#   ./launch.sh sweep configs/X.yaml key=a,b,c [key=value ...]   one run per value, then one page that compares them
#
# One GPU or none: plain python. Several GPUs, through accelerate: as many as share a batch evenly, 8 images each
# at least. Your own launcher settings (HEAD_NODE is yours to set):
#   ACCELERATE_ARGS="--num_processes 8 --multi_gpu" ./launch.sh configs/X.yaml
#   SLURM: srun --nodes 2 --ntasks-per-node 1 bash -c 'ACCELERATE_ARGS="--multi_gpu --num_machines 2 --num_processes 16 \
#     --machine_rank $SLURM_NODEID --main_process_ip $HEAD_NODE --main_process_port 29500" ./launch.sh configs/X.yaml'
# PYTHON=python3.12 chooses the interpreter that .venv is made of.
set -euo pipefail
[ -n "${HOME:-}" ] || export HOME="${TMPDIR:-/tmp}/latent-stack-$(id -u)" # of a user that nobody has entered

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"
python="$venv/bin/python"
plan=() # the arguments of the plan that is carried out
gpus=   # how many PyTorch can use, once they were counted

install() {
    local wanted
    wanted=$(cat "$here/pyproject.toml" "$here/configs/constraints.txt" | cksum)
    [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted $here" ] && return
    if command -v flock >/dev/null; then # the nodes of a job may share this folder
        exec 9>"$here/.venv.lock"
        flock 9 || true                   # some shared disks have no locks
        [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted $here" ] && { exec 9>&-; return; }
    fi
    echo "installing into $venv (once; some minutes)"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: Python 3.11 or newer is needed: PYTHON=python3.12 ./launch.sh ..." >&2; exit 2; }
        "${PYTHON:-python3}" -m venv --clear "$venv"
    fi
    local again
    trap 'exit 130' INT # which pip takes for a failure of its own
    for again in 10 60 ""; do # a network fails at times, and what has come is kept
        "$python" -m pip install --quiet --disable-pip-version-check --editable "$here[all]" \
            --constraint "$here/configs/constraints.txt" && break
        [ -n "$again" ] || { echo "error: not installed, see above; the same command goes on from here" >&2; exit 1; }
        echo "installing failed; once more in $again s" >&2
        sleep "$again"
    done
    trap - INT
    echo "$wanted $here" >"$venv/.installed"
    exec 9>&-
}

wait_for() { # a step, in a process group of its own: signals reach it once, from here, and it is waited for
    local child code name tries caught= workers=
    set -m
    LATENT_STACK_LAUNCHED=1 "$@" & # which a training takes as a mark: it ends with this shell
    child=$!
    set +m
    for name in TERM USR1 INT HUP; do
        # shellcheck disable=SC2064  # of this child
        trap "caught=$name; workers+=\" \$(pgrep -P $child 2>/dev/null || true)\"; kill -s $name -- -$child 2>/dev/null || true" "$name"
    done
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # else a signal came in between
    done
    trap - TERM USR1 INT HUP
    [ -n "$caught" ] || return "$code"
    for name in $workers; do # a launcher may end first, and by a number of its own, while its processes save
        for ((tries = 0; tries < 1500; tries++)); do
            kill -0 "$name" 2>/dev/null || break
            sleep 0.2
        done
    done
    return $((128 + $(kill -l "$caught")))
}

count_gpus() { # before anything is planned or trained: a GPU that is not used is said first
    [ -z "$gpus" ] || return 0
    gpus=0
    command -v nvidia-smi >/dev/null || return 0
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 0 ] || [ -n "${CUDA_VISIBLE_DEVICES+set}" ] ||
        echo "warning: PyTorch cannot use this machine's GPU (its driver is too old, or PyTorch a CPU build): on the CPU" >&2
}

launch() { # IMAGES step...: in as many processes as ACCELERATE_ARGS says, or as share IMAGES evenly over the GPUs
    local images=$1 processes
    shift
    count_gpus
    processes=$gpus
    while [ "$processes" -gt 1 ] && { [ $((images % processes)) -ne 0 ] || [ $((images / processes)) -lt 8 ]; }; do
        processes=$((processes - 1)) # fewer than 8 images keep a GPU waiting for the others
    done
    if [ -z "${ACCELERATE_ARGS:-}" ] && [ "$processes" -le 1 ]; then
        wait_for "$python" "$@"
    else
        # shellcheck disable=SC2086  # the arguments are words
        wait_for "$python" -m accelerate.commands.launch ${ACCELERATE_ARGS:---multi_gpu --num_machines 1 --num_processes $processes --mixed_precision no --dynamo_backend no} "$@"
    fi
}

asks() { # whether one of the words is an option, such as --help: recipes take none
    local word
    for word in "$@"; do case $word in -*) return 0 ;; esac; done
    return 1
}

recipe() { # configs/X.yaml [key=value ...]
    local config=$1 resolved run stages images
    shift
    if asks "$@"; then exec "$python" -m shared.recipe "$config" "$@"; fi
    resolved=$("$python" -m shared.recipe "$config" "$@")
    { read -r stages run; read -r -a images; } <<<"$resolved"
    [ "$stages" = stage2 ] || launch "${images[0]}" "$here/stage1_vae/train.py" --config "$config" "$@"
    if [ "$stages" = both ]; then
        launch "${images[0]}" "$here/stage1_vae/encode.py" --run "$run"
        [ ${#plan[@]} -eq 0 ] || "$python" -m shared.plan "${plan[@]}" # by the time that is left
    fi
    [ "$stages" = stage1 ] || launch "${images[1]}" "$here/stage2_diffusion/train.py" --config "$config" "$@"
    [ "${SLURM_NODEID:-0}" = 0 ] || return 0
    wait_for "$python" -m shared.generate --run "$run"
    wait_for "$python" -m shared.doctor --run "$run"
    wait_for "$python" -m shared.report --run "$run"
    [ "$stages" = stage1 ] || wait_for "$python" -m shared.publish --run "$run"
    echo "pictures: $run/samples/grid.png, $run/report/report.html"
}

planned() { # SOURCE [--minutes M] [key=value ...]
    local config
    [ "${SLURM_NNODES:-1}" -eq 1 ] ||
        { echo "error: a plan is of one machine: python -m shared.plan $*, then ./launch.sh its recipe" >&2; exit 2; }
    count_gpus
    [ "$gpus" -le 1 ] || echo "note: planned by what one of $gpus GPUs does: with more of them it ends earlier" >&2
    plan=("$@")
    config=$("$python" -m shared.plan "$@" | {
        while IFS= read -r line; do # not by tee, which would open a log that stderr goes to anew, and empty it
            printf '%s\n' "$line" >&2
            last=$line
        done
        echo "${last:-}"
    })
    recipe "$config"
}

sweep() { # configs/X.yaml key=a,b,c [key=value ...]; goes on after a run that fails
    local config=${1:-} values=${2:-} lines words run code runs=() failed=()
    if asks "$@"; then exec "$python" -m shared.recipe "$@"; fi
    shift $(($# < 2 ? $# : 2))
    lines=$("$python" -m shared.recipe --sweep "$values" "$config" "$@")
    while IFS=$'\t' read -r -u 3 -a words; do
        run=${words[1]#run_dir=}
        code=0
        wait_for "$here/launch.sh" "$config" "${words[@]}" || code=$?
        if [ "$code" -eq 0 ] && [ "${SLURM_NODEID:-0}" = 0 ] && [ -d "$run/stage1_vae" ]; then
            wait_for "$python" -m shared.evaluate --run "$run" || code=$?
        fi
        case $code in 129 | 130 | 138 | 143 | 158) exit "$code" ;; esac # a signal to all of it
        if [ "$code" -eq 0 ]; then runs+=("$run"); else failed+=("$run"); fi
    done 3<<<"$lines"
    if [ "${SLURM_NODEID:-0}" = 0 ] && [ ${#runs[@]} -gt 0 ]; then
        wait_for "$python" -m shared.report --run "${runs[@]}"
    fi
    [ ${#failed[@]} -eq 0 ] || { echo "error: not finished: ${failed[*]}" >&2; exit 1; }
}

case "${1:-}" in
demo)
    install
    recipe "$here/configs/digits.yaml" "${@:2}"
    ;;
sweep)
    install
    sweep "${@:2}"
    ;;
test)
    install
    cd "$here"
    # a test for each core, up to four: most of them wait for a process of one thread to start
    exec "$python" -m pytest --numprocesses auto --maxprocesses 4 "${@:2}"
    ;;
"" | -h | --help)
    sed -e '1d' -e '/^set/,$d' -e 's/^# \{0,1\}//' "${BASH_SOURCE[0]}"
    ;;
*.yaml | *.yml)
    install
    recipe "$@"
    ;;
*)
    install
    case " $* " in *" -h "* | *" --help "* | *" --version "*) exec "$python" -m shared.plan "$@" ;; esac
    planned "$@"
    ;;
esac
