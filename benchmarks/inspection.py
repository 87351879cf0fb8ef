"""What it takes to look into a checkpoint, beside what it takes to read it.

`python -m benchmarks.inspection` writes a sharded safetensors checkpoint in bfloat16, in shapes of a large language
model, reads all of its bytes, and measures its matrices as `msign inspect` does, each in a process of its own: CPU
seconds per GB, and the most memory beyond that of the imports (Linux). What was just written is read from memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import FOLDER, keep, table, the_device
from msign_lightning.recipes.provenance import provenance

READ = "import pathlib; [len(file.read_bytes()) for file in pathlib.Path(folder).iterdir()]"
INSPECT = "[*measure(select(folder, model=None))]"
PROGRAM = """
import re, sys, time, torch, transformers
from msign_lightning.checkpoints import measure, select
torch.set_num_threads(1)
folder = sys.argv[1]
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before, began = peak(), time.process_time()
{work}
print(time.process_time() - began, peak() - before)
"""


def write(folder: Path, layers: int, width: int, mlp_width: int) -> int:
    """Writes a file per layer; bytes in all."""
    index: dict[str, str] = {}
    sizes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 4, width)}
    sizes |= {"self_attn.v_proj": (width // 4, width), "self_attn.o_proj": (width, width)}
    sizes |= {"mlp.gate_proj": (mlp_width, width), "mlp.up_proj": (mlp_width, width)}
    sizes |= {"mlp.down_proj": (width, mlp_width)}
    for layer in range(layers):
        name, header, end = f"model-{layer}.safetensors", {}, 0
        tensors = {f"model.layers.{layer}.{part}.weight": torch.randn(size).bfloat16() for part, size in sizes.items()}
        for key, tensor in tensors.items():
            header[key] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [end, end := end + tensor.nbytes]}
            index[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.view(torch.uint8).numpy())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(file.stat().st_size for file in folder.iterdir())


def main(layers: int, width: int, mlp_width: int, folder: Path) -> None:
    """Prints the table and keeps it, with date, processor and versions."""
    for name, value in (("layers", layers), ("width", width), ("mlp_width", mlp_width)):
        if value < 4:
            raise ValueError(f"{name} must be at least 4, got {value}")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        gigabytes = write(Path(place), layers, width, mlp_width) / 1e9
        for title, work in (("reading", READ), ("inspecting", INSPECT)):
            command = [sys.executable, "-c", PROGRAM.format(work=work), place]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds, kilobytes = map(float, output.split())
            rows.append([title, f"{seconds:.1f}", f"{seconds / gigabytes:.2f}", f"{kilobytes / 1e6:.2f}"])
    largest = 2 * max(width, mlp_width) * width / 1e9
    command_line = f"`python -m benchmarks.inspection --layers {layers} --width {width} --mlp_width {mlp_width}`"
    hardware = the_device()[2] if not torch.cuda.is_available() else "CPU beside " + the_device()[2]
    report = "\n".join(
        [
            f"# Looking into a checkpoint on {hardware}",
            "",
            f"{command_line}: {provenance()}.",
            f"{gigabytes:.2f} GB of safetensors in bfloat16, {layers} layers of {width} × {mlp_width}, a file each;",
            f"the largest matrix has {largest:.2f} GB. One thread; reading takes a file at a time.",
            "",
            table(("what", "CPU s", "CPU s / GB", "peak GB"), rows),
            "",
        ]
    )
    keep(report, folder, "inspection", hardware)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp_width", type=int, default=11008)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the report goes")
    main(**vars(parser.parse_args()))
