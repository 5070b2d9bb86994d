"""A fused network as ONNX, for any batch, run by ONNX Runtime on a CPU; needs onnxscript and onnxruntime.

    python examples/to_onnx.py --network resnet50 --out out/network.onnx

ONNX has no operators of ours, so the file holds the network's own: `unfuse_` gives blocks their own forward back,
weights and statistics are what they were all along, and `fuse_` afterwards goes on as before. (torch.onnx.export takes
the fused network, too, and writes the same operators.) Prints how far the scores are off eager's, and the milliseconds.
"""

import copy
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer
from compared import agree, forward, network, times
from torch import Tensor

from fused_cnn import fuse_, unfuse_

MOST = 64  # images in a batch


def main(
    name: Annotated[str, typer.Option("--network", help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Images at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="The file.")] = Path("out/network.onnx"),
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each batch.")] = 2.0,
) -> None:
    """Write a fused network as ONNX, and run it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    eager, images = network(name, max(batch, 2), size)
    expected = forward(eager, images)()
    model = copy.deepcopy(eager)
    fuse_(model)
    agree("fused", forward(model, images)(), expected)

    unfuse_(model)
    sizes = ({0: torch.export.Dim("batch", min=1, max=MOST)},)
    with torch.no_grad():
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    program.save(out)
    fuse_(model)
    agree("fused again", forward(model, images)(), expected)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])

    def onnx(n: int) -> Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images[:n].numpy()})[0])

    for n in sorted({1, 2, batch}):
        agree(f"{out.name}, batch {n}", onnx(n), expected[:n])
    times(batch, {"fused": forward(model, images[:batch]), "ONNX Runtime": lambda: onnx(batch)}, seconds)


if __name__ == "__main__":
    typer.run(main)
