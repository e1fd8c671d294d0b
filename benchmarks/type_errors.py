"""What every GGUF tensor type loses on Gaussian weights: squared error over squared weights.

    PYTHONPATH=. python benchmarks/type_errors.py [--size 1024] [--seeds 3] [--spread 0.05]

One matrix of every type lies in a file that llama.cpp quantizes as the exporter has it done, without an
importance matrix; gguf-py reads it back. Prints the table, writes results/type_errors.json. The constants of
`edgeprune.costs.gguf_types.relative_error` come from it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from _common import write_results

from edgeprune import graph
from edgeprune.costs import gguf_types
from edgeprune.exporters import gguf as exporter
from edgeprune.records import LayerShape, ModelDims

# without an importance matrix llama.cpp refuses to make the others
TYPES = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS")
TYPES += ("IQ3_S", "Q3_K", "Q2_K")


def errors(folder: Path, types: Sequence[str], *, size: int, seed: int, spread: float) -> dict[str, float]:
    """Relative squared error by type, of one `size` x `size` matrix each."""
    family = graph.find_family("llama")
    layer = LayerShape(n_heads=1, n_kv_heads=1, n_ff=size)
    dims = ModelDims(
        family="llama",
        vocab=32,
        hidden=size,
        head_dim=size,
        max_context=64,
        tied=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        rms_eps=1e-5,
        layers=(layer,) * len(types),
    )
    rng = np.random.default_rng(seed)
    shapes = graph.graph_of(family, dims).shapes
    weights: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        array = spread * rng.standard_normal(shapes[name], np.float32)
        if name.endswith("up_proj.weight"):
            weights[name] = array
        return array

    master, out = folder / "master.gguf", folder / "out.gguf"
    exporter.write(master, family, dims, {}, [], read, dtype="F32")
    kinds: Mapping[str, str] = {
        name: "Q8_0" if shape[-1] == size and len(shape) == 2 else "F32"
        for name, shape, _ in exporter.tensor_table(family, dims, {})
    }
    wanted = {f"blk.{i}.ffn_up.weight": kind for i, kind in enumerate(types)}
    exporter.quantize(master, out, quantization="Q8_0", types={**kinds, **wanted}, imatrix=None, threads=1)
    found: dict[str, float] = {}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for index, kind in enumerate(types):
        tensor = stored[f"blk.{index}.ffn_up.weight"]
        assert tensor.tensor_type.name == kind
        read_back = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        exact = weights[family.tensor("up", index)].astype(np.float64)
        found[kind] = float(np.square(read_back.reshape(exact.shape) - exact).sum() / np.square(exact).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns, a multiple of 256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spread", type=float, default=0.05, help="standard deviation of the weights")
    given = parser.parse_args()
    runs = []
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(errors(Path(folder), TYPES, size=given.size, seed=seed, spread=given.spread))
    rows = []
    print(f"{'type':8} {'bits':>6} {'relative squared error':>23} {'spread of seeds':>16}")
    for kind in TYPES:
        values = [run[kind] for run in runs]
        mean = statistics.mean(values)
        apart = (max(values) - min(values)) / mean
        bits = 8 * gguf_types.TYPES[kind].block_bytes / gguf_types.TYPES[kind].block
        rows.append({"type": kind, "bits": bits, "error": mean, "apart": apart, "values": values})
        print(f"{kind:8} {bits:6.3f} {mean:23.4e} {100 * apart:15.2f}%")
    path = write_results(
        "type_errors", {"size": given.size, "seeds": given.seeds, "spread": given.spread, "types": rows}
    )
    print(path)


if __name__ == "__main__":
    main()
