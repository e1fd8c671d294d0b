"""Load a Hugging Face folder with transformers, without edgeprune, and generate.

A folder with widths per layer names the code beside its weights in config.json; the other is loaded without
any trust.
"""

import json
import sys
from pathlib import Path

import transformers
from _client import NEW_TOKENS, answer


def main(folder: str, prompt: str, texts: str | None = None) -> int:
    transformers.logging.disable_progress_bar()
    own_code = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code).eval()
    if not own_code and not type(model).__module__.startswith("transformers.models."):
        print(f"Error: {type(model).__module__} is no stock class", file=sys.stderr)
        return 1
    if "edgeprune" in sys.modules:
        print("Error: the folder needs edgeprune to load", file=sys.stderr)
        return 1
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    start = given["input_ids"].shape[1]
    return answer(
        "transformers",
        transformers.__version__,
        given=made[:start],
        made=made[start:],
        text=tokenizer.decode(made),
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        texts=texts,
        loaded="with trust_remote_code" if own_code else "stock class",
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
