"""Load an ONNX folder with onnxruntime-genai and generate."""

import sys

import onnxruntime_genai as og
from _client import NEW_TOKENS, answer


def main(folder: str, prompt: str, texts: str | None = None) -> int:
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    given = tokenizer.encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(given) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(given)
    while not generator.is_done():
        generator.generate_next_token()
    made = [int(token) for token in generator.get_sequence(0)]
    return answer(
        "onnxruntime-genai",
        og.__version__,
        given=given,
        made=made[len(given) :],
        text=tokenizer.decode(made),
        encode=tokenizer.encode,
        texts=texts,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
