"""PyTorch's private names in use: each may be gone in the next version, so each is listed here, with what happens
then."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fused_cnn

PACKAGE = Path(fused_cnn.__file__).parent
WITHOUT_IT = {
    "torch._ops.OpOverload": "a type in annotations, which nothing evaluates",
    "torch.utils._python_dispatch.TorchDispatchMode": "counting (fused_cnn.analysis) does not import; "
    "ops, modules and fuse_ do without",
    "torch.ops.mkldnn._convolution_pointwise": "a peer in a benchmark: its column is left out, with the reason",
    "torch.cuda._sleep": "cold timings on a GPU start without the host's head start",
    "_dynamo_marked_constant": "torch.compile traces the first look-up of a backend, and finds later ones in a table",
    "torch._C": "ops run their kernels under torch.func's transforms, on batches of gradients and in make_fx's "
    "pre_dispatch too, of which test_transforms.py, ops/test_second_derivatives.py and test_tracing.py then tell",
    "torch._C._TorchDispatchModeKey": "blocks and ops run as in a recorded graph under any dispatch mode",
    "torch._C._get_dispatch_mode": "blocks and ops run as in a recorded graph under any dispatch mode",
    "torch.overrides._get_current_function_mode_stack": "blocks run unfused under any mode",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": "blocks run unfused under any mode",
    "torch._inductor": "an exported plan is not packaged (plan/export.py), which the documented call of that name does",
    "torch._inductor.config": "a peer in a benchmark: its column is left out, with the reason",
}


def private_names(text: str) -> Iterator[str]:
    """Of PyTorch: imported or reached by attributes from `torch`, up to the first thing that is called or is not
    private any more."""
    aliases = {"torch": "torch"}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "torch":
            for a in node.names:
                aliases[a.asname or a.name] = f"{node.module}.{a.name}"
                if "._" in f".{node.module}.{a.name}":
                    yield f"{node.module}.{a.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_dynamo_"):  # the compiler's marks, on anything
            yield node.attr
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            name = dotted(node)
            if name and name.partition(".")[0] in aliases and "." in name:
                head, _, rest = name.partition(".")
                yield f"{aliases[head]}.{rest}"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_every_private_name_of_torch_is_known_and_can_be_done_without() -> None:
    used = {
        name: path.relative_to(PACKAGE)
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in private_names(path.read_text())
    }
    unknown = {name: str(path) for name, path in used.items() if name not in WITHOUT_IT}
    assert not unknown, f"find a public way, or a fallback, for {unknown}"
    assert used.keys() == WITHOUT_IT.keys(), "a name that is not used any more is still listed"


def test_the_search_sees_private_names() -> None:
    text = "import torch._dynamo\n"
    text += (
        "from torch import nn, _C\nfrom torch.nn import functional as F\nF._pad(1); nn._x.y; torch.a._b.c(1); nn.ok(2)"
    )
    assert set(private_names(text)) == {
        "torch._dynamo",
        "torch._C",
        "torch.nn.functional._pad",
        "torch.nn._x",
        "torch.a._b",
    }
