"""torch.compile of a fused network: one program for every batch of two images or more.

    python examples/compile_fused.py --network resnet50

The whole network is one graph (`fullgraph=True`), in which a fused block is one op on the weights that the block has:
Inductor compiles what lies between blocks. The op folds and packs at the graph's first calls, and again when weights
have changed. The batch is a variable of the program. PyTorch makes an exception of sizes of one, so that a single image
has a program of its own. Prints how far the scores are off eager's, and the milliseconds.
"""

import copy
from typing import Annotated

import torch
import typer
from compared import agree, forward, network, times
from torch._dynamo.utils import counters

from fused_cnn import fuse_


def main(
    name: Annotated[str, typer.Option("--network", help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be given again; 8, 3 and 1 by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each batch.")] = 2.0,
) -> None:
    """Compile a fused network once, and run it on several batch sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # TF32 has three digits, which is less than what scores are held to
    batches = batch or [8, 3, 1]
    eager, images = network(name, max(*batches, 2), size, device)
    fused = copy.deepcopy(eager)
    print(f"{len(fuse_(fused).fused)} blocks fused")
    compiled = torch.compile(fused, fullgraph=True)
    # `dynamic=True` would make variables of all sizes, and one variable of those that are equal at the first call:
    # three images would be tied to the three channels.
    torch._dynamo.mark_dynamic(images, 0)
    with torch.no_grad():
        compiled(images)
        with torch.compiler.set_stance("fail_on_recompile"):  # a program of another size would be an error
            for n in sorted({len(images), 2, *batches} - {1}):
                agree(f"batch {n}, the same program", compiled(images[:n]), eager(images[:n]))
        if 1 in batches:
            agree("batch 1, a program of its own", compiled(images[:1]), eager(images[:1]))
    print(f"programs compiled: {counters['stats']['unique_graphs']}")
    for n in batches:
        models = {"eager": eager, "fused": fused, "compiled": compiled}
        times(n, {variant: forward(model, images[:n]) for variant, model in models.items()}, seconds, device)


if __name__ == "__main__":
    typer.run(main)
