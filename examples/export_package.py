"""torch.export and AOTInductor, on a CPU: a network as files that other processes run.

    python examples/export_package.py --network resnet50 --out out/package

The plan of an optimized network has its weights packed, as constants, and is good for the example's shape and this
processor's instruction set. `plan.pt2` is its graph, for whatever takes torch.export's; `network.pt2` its AOTInductor
package, which needs no Python: the command that is printed in the end runs it in C++ and compares its results.
`any_batch.pt2` is the package of a fused network, for batches of 1 to 64 images. Its constants are the network's own
weights, which its ops fold and pack at the first calls; these ops are written in Python, so that what loads the package
imports fused_cnn. Prints how far the scores are off eager's, and the milliseconds.
"""

import copy
import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer
from compared import agree, forward, network, times

from fused_cnn import _library, fuse_, optimize
from fused_cnn.plan.export import exported, package

MOST = 64  # images in a batch


def main(
    name: Annotated[str, typer.Option("--network", help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Images at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("out/package"),
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each batch.")] = 2.0,
) -> None:
    """Write packages of a network, load them, and run them."""
    out.mkdir(parents=True, exist_ok=True)
    eager, more = network(name, max(batch, 2), size)
    images, expected = more[:batch], forward(eager, more)()

    fast = optimize(eager, images)
    torch.export.save(exported(fast), out / "plan.pt2")
    plan = torch.export.load(out / "plan.pt2").module()
    agree("plan.pt2", plan(images), expected[:batch])
    packaged = torch._inductor.aoti_load_package(package(fast, out / "network.pt2"))
    agree("network.pt2", packaged(images), expected[:batch])

    fused = copy.deepcopy(eager)
    fuse_(fused)
    sizes = ({0: torch.export.Dim("batch", min=1, max=MOST)},)
    with torch.no_grad():
        program = torch.export.export(fused, (more,), dynamic_shapes=sizes)  # of two images: a single one stays one
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(out / "any_batch.pt2"))
        any_batch = torch._inductor.aoti_load_package(file)
        for n in sorted({1, 2, batch}):
            agree(f"any_batch.pt2, batch {n}", any_batch(more[:n]), expected[:n])

    variants = {"fused": fused, "optimized": fast, "network.pt2": packaged, "any_batch.pt2": any_batch}
    times(batch, {variant: forward(model, images) for variant, model in variants.items()}, seconds)
    torch.save([images], out / "inputs.pt")
    torch.save([fast(images)], out / "results.pt")
    files = [str(out.resolve() / file) for file in ("network.pt2", "inputs.pt", "results.pt")]
    command = shlex.join(["run_package", *files, str(_library.cpu.file)])
    print(f"without Python (examples/run_package.cpp says how it is built): {command}")


if __name__ == "__main__":
    typer.run(main)
