# Sourced by the scripts beside it: checks what they are given, names the cache, finds npm packages.

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
ROOT="$(cd "$HERE/../.." && pwd -P)"
CACHE="${EDGEPRUNE_INTEROP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgeprune/interop}"
TRANSFORMERS_JS="4.3.1"

say() { printf '%s\n' "$*" >&2; }

refuse() {
    say "Error: $1"
    say "Hint: $2"
    exit 1
}

# All scripts: NAME MODEL [PROMPT [TEXTS]], or NAME --set-up, which only fetches what the client needs. With TEXTS,
# a JSON list of texts, one JSON object comes out: ids of the prompt, what was generated, ids of every text.
SET_UP=""
given() { # what is missing, arguments...
    if [[ "${2:-}" == --set-up ]]; then
        SET_UP=1
        return
    fi
    if (($# < 2)) || [[ "$2" == -* ]]; then
        refuse "no $1 given" "scripts/interop/$(basename "$0") ${1^^} [PROMPT]"
    fi
    PROMPT="${3:-The capital of France is}"
    TEXTS="${4:-}"
    if [[ -n "$TEXTS" ]]; then
        [[ -f "$TEXTS" ]] || refuse "$TEXTS is no file" "give a JSON list of texts"
        TEXTS="$(cd "$(dirname "$TEXTS")" && pwd -P)/$(basename "$TEXTS")"
    fi
}

artifact() {
    given "folder" "$@"
    if [[ -n "$SET_UP" ]]; then return; fi
    [[ -d "$1/onnx" ]] || refuse "$1 is no ONNX folder" "make one: edgeprune export MODEL --format onnx --out FOLDER"
    FOLDER="$(cd "$1" && pwd -P)"
    [[ -f "$FOLDER/tokenizer.json" ]] || refuse "$FOLDER has no tokenizer.json" "export a model that has one"
}

# a GGUF file, or a folder with one
gguf_model() {
    given "model" "$@"
    if [[ -n "$SET_UP" ]]; then return; fi
    MODEL="$1"
    if [[ -d "$1" ]]; then
        local found=("$1"/*.gguf)
        [[ -f "${found[0]}" && ${#found[@]} -eq 1 ]] || refuse "$1 does not hold one GGUF file" "give the file"
        MODEL="$(cd "$1" && pwd -P)"
    else
        [[ -f "$1" ]] || refuse "$1 is no GGUF file" "make one: edgeprune export MODEL --format gguf --out FILE"
        MODEL="$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")"
    fi
}

# a Hugging Face folder
hf_model() {
    given "folder" "$@"
    if [[ -n "$SET_UP" ]]; then return; fi
    [[ -f "$1/config.json" && -f "$1/model.safetensors" ]] ||
        refuse "$1 is no Hugging Face folder" "make one: edgeprune prune MODEL --ratio 0.2 --out FOLDER"
    FOLDER="$(cd "$1" && pwd -P)"
}

set_up_only() { # what is ready
    if [[ -n "$SET_UP" ]]; then
        printf 'ready: %s\n' "$1"
        exit 0
    fi
}

# the project's own environment
python_with() { # module, extra
    PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
    "$PYTHON" -c "import $1" 2>/dev/null || refuse "$1 is not installed for $PYTHON" \
        "scripts/test --version sets up .venv with all of it; or pip install 'edgeprune[$2]' and set PYTHON"
}

version_of() { "$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1"; }

need() { # program, what it is for
    command -v "$1" >/dev/null 2>&1 || refuse "$1 is not installed" "$2"
}

# transformers.js with its ONNX Runtime, once, into $CACHE/js
transformers_js() {
    need node "install Node.js 20 or newer (Debian: apt install nodejs npm)"
    need npm "install npm (Debian: apt install npm)"
    local found="$CACHE/js/node_modules/@huggingface/transformers/package.json"
    if ! grep -q "\"version\": \"$TRANSFORMERS_JS\"" "$found" 2>/dev/null; then
        say "installing @huggingface/transformers $TRANSFORMERS_JS into $CACHE/js (about 470 MB on disk)"
        # beside its place first: one that was stopped half way would look whole
        rm -rf "$CACHE/js.part"
        mkdir -p "$CACHE/js.part"
        # the install script of onnxruntime-node would fetch CUDA libraries
        npm install --prefix "$CACHE/js.part" --ignore-scripts --no-audit --no-fund --silent \
            "@huggingface/transformers@$TRANSFORMERS_JS" >&2 ||
            refuse "npm could not install @huggingface/transformers" "is registry.npmjs.org reachable?"
        rm -rf "$CACHE/js"
        mv "$CACHE/js.part" "$CACHE/js"
    fi
}
