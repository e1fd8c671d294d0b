"""Folders whose layers differ in width load in stock transformers, without edgeprune, by their own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from builders import FAMILIES, logits, tiny_family, tiny_llama
from test_surgery import TOKENS, plan_of

import edgeprune
from edgeprune import checkpoint, graph, remote_code, surgery

# layer 1 loses its attention, layer 2 its FFN, the others some of both
KEPT = {
    "layers.0.ffn": tuple(range(0, 128, 2)),
    "layers.0.kv": (1,),
    "layers.1.kv": (),
    "layers.2.ffn": (),
    "layers.3.ffn": tuple(range(5, 100)),
}
LOAD = """
import sys
sys.modules["edgeprune"] = None  # any import of it fails
import numpy as np, torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor([[int(t) for t in sys.argv[1].split()]])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == "PrunedForCausalLM"
    model.eval()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits[0].numpy()
        prompt = tokens[:, :8]
        more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
        more |= {"eos_token_id": None, "pad_token_id": 0}
        made = [model.generate(prompt, use_cache=cached, **more)[0].tolist() for cached in (True, False)]
    assert made[0] == made[1] and len(made[0]) == 20, made
    np.save(folder + ".npy", whole)
"""


def cut(folder: Path, kept: dict[str, tuple[int, ...]], out: Path) -> Path:
    source = checkpoint.SafetensorsSource(folder)
    built = graph.build(source.config)
    surgery.prune(source, built, plan_of(built, kept), out, extras=None)
    return out


def test_stock_transformers_loads_them(tmp_path: Path) -> None:
    """Llama, Gemma 3 with its norms behind the blocks, and a model whose first layer has no attention."""
    folders = [cut(tiny_family(tmp_path / f"{n}-dense", n), KEPT, tmp_path / n) for n in ("llama", "gemma3")]
    odd = tiny_llama(tmp_path / "odd-dense", hidden=96, heads=6, kv_heads=6, tied=True)
    # the cache counts tokens in its first layer; 96 is no multiple of 5 heads
    kept: dict[str, tuple[int, ...]] = {"layers.0.kv": (), "layers.1.kv": (0, 1, 2, 3, 5)}
    folders.append(cut(odd, kept | {"layers.2.kv": (1, 4)}, tmp_path / "odd"))
    config = json.loads((folders[-1] / "config.json").read_text())
    assert config["num_attention_heads"] == 5 and config["auto_map"] == remote_code.auto_map()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, " ".join(map(str, TOKENS)), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=env | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        expected = logits(edgeprune.load(folder), TOKENS)
        assert np.abs(np.load(f"{folder}.npy") - expected).max() < 1e-4


def test_uniform_folders_need_no_code(tmp_path: Path) -> None:
    """A cut of a folder with code of its own does not point to a file that is no longer there."""
    folder = tiny_llama(tmp_path / "dense", heads=4, kv_heads=4)
    uneven = cut(folder, {"layers.0.ffn": tuple(range(64))}, tmp_path / "a")
    assert (uneven / remote_code.FILE_NAME).is_file()
    cut(uneven, {f"layers.{i}.ffn": tuple(range(64)) for i in (1, 2)}, tmp_path / "b")
    assert "auto_map" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert not (tmp_path / "b" / remote_code.FILE_NAME).exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_code_names_classes_that_exist(name: str) -> None:
    import transformers

    family = graph.find_family(FAMILIES[name].model_type)
    text = remote_code.code(family)
    line = next(line for line in text.splitlines() if line.startswith("from transformers import "))
    names = line.removeprefix("from transformers import ").split(", ")
    assert names[1] == family.hf_class
    assert all(hasattr(transformers, n) for n in names)
    assert getattr(transformers, names[0]).model_type == FAMILIES[name].model_type
    compile(text, remote_code.FILE_NAME, "exec")
    assert not any(word in text for word in ("MODEL", "CONFIG", "LAYERS", "_LIST"))
