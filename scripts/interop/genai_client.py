"""Load an ONNX folder with onnxruntime-genai and generate."""

import sys

import onnxruntime_genai as og


def main(folder: str, prompt: str) -> int:
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    given = tokenizer.encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(given) + 24, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(given)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0)
    if len(made) <= len(given):
        print("Error: onnxruntime-genai generated nothing", file=sys.stderr)
        return 1
    print(tokenizer.decode(made))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
