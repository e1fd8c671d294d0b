"""Load a GGUF file with llama-cpp-python and generate."""

import sys
from pathlib import Path

import llama_cpp
from _client import NEW_TOKENS, answer


def main(model: str, prompt: str, texts: str | None = None) -> int:
    path = Path(model)
    if path.is_dir():
        (path,) = path.glob("*.gguf")
    llm = llama_cpp.Llama(str(path), n_ctx=512, flash_attn=True, verbose=False)
    given = llm.tokenize(prompt.encode(), special=True)
    made: list[int] = []
    for token in llm.generate(given, temp=0.0):
        if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llm.model), token):
            break
        made.append(token)
        if len(made) == NEW_TOKENS:
            break
    return answer(
        "llama-cpp-python",
        llama_cpp.__version__,
        given=given,
        made=made,
        text=llm.detokenize(given + made, special=True).decode("utf-8", "replace"),
        encode=lambda text: llm.tokenize(text.encode(), add_bos=False, special=True),
        texts=texts,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
