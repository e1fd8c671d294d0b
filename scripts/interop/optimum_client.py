"""Load an ONNX folder with optimum's ORTModelForCausalLM and generate; runs in its own environment.

optimum makes the empty cache with one KV head count for all layers. Where the layers differ, `PerLayer`
reads the counts from the file; that is all a user of such a folder has to add.
"""

import sys
from importlib.metadata import version

import torch
from _client import NEW_TOKENS, answer
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


class PerLayer(ORTModelForCausalLM):
    """An empty cache with the head count of each layer."""

    # generate() looks at the names of these arguments
    def forward(self, input_ids, attention_mask=None, past_key_values=None, position_ids=None, **kwargs):
        if past_key_values is None:
            shapes = [i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
            empty = [torch.zeros(len(input_ids), s[1], 0, s[3], dtype=self.dtype) for s in shapes]
            past_key_values = tuple(zip(empty[::2], empty[1::2], strict=True))
        return super().forward(input_ids, attention_mask, past_key_values, position_ids, **kwargs)


def main(folder: str, prompt: str, texts: str | None = None) -> int:
    model = ORTModelForCausalLM.from_pretrained(folder, local_files_only=True)
    caches = [i for i in model.session.get_inputs() if i.name.startswith("past_key_values.")]
    heads = {i.shape[1] for i in caches}
    loaded = "as it is"
    if heads != {model.num_key_value_heads} or caches[0].shape[3] != model.embed_size_per_head:
        loaded = f"with PerLayer, KV heads per layer: {sorted(heads)}"
        print(loaded, file=sys.stderr)
        model = PerLayer.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    start = given["input_ids"].shape[1]
    made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return answer(
        "optimum",
        f"optimum-onnx {version('optimum-onnx')}, transformers {version('transformers')}",
        given=made[:start],
        made=made[start:],
        text=tokenizer.decode(made),
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        texts=texts,
        loaded=loaded,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
