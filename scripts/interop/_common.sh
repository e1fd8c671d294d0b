# Sourced by the scripts beside it: checks the artifact folder, names the cache, finds npm packages.

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

# Usage of all scripts: NAME FOLDER [PROMPT]
artifact() {
    if (($# < 1)) || [[ "$1" == -* ]]; then
        refuse "no artifact folder given" "scripts/interop/$(basename "$0") FOLDER [PROMPT]"
    fi
    [[ -d "$1/onnx" ]] || refuse "$1 is no ONNX folder" "make one: edgeprune export MODEL --format onnx --out FOLDER"
    FOLDER="$(cd "$1" && pwd -P)"
    [[ -f "$FOLDER/tokenizer.json" ]] || refuse "$FOLDER has no tokenizer.json" "export a model that has one"
    PROMPT="${2:-The capital of France is}"
}

need() { # program, what it is for
    command -v "$1" >/dev/null 2>&1 || refuse "$1 is not installed" "$2"
}

# transformers.js with its ONNX Runtime, once, into $CACHE/js
transformers_js() {
    need node "install Node.js 20 or newer (Debian: apt install nodejs npm)"
    need npm "install npm (Debian: apt install npm)"
    local found="$CACHE/js/node_modules/@huggingface/transformers/package.json"
    if ! grep -q "\"version\": \"$TRANSFORMERS_JS\"" "$found" 2>/dev/null; then
        say "installing @huggingface/transformers $TRANSFORMERS_JS into $CACHE/js (about 470 MB)"
        mkdir -p "$CACHE/js"
        # the install script of onnxruntime-node would fetch CUDA libraries
        npm install --prefix "$CACHE/js" --ignore-scripts --no-audit --no-fund --silent \
            "@huggingface/transformers@$TRANSFORMERS_JS" >&2 ||
            refuse "npm could not install @huggingface/transformers" "is registry.npmjs.org reachable?"
    fi
}
