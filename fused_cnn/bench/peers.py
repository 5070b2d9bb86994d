"""Who else does the work: torch.compile, CUDA graphs, oneDNN's and cuDNN's fused calls, ONNX Runtime and OpenVINO.

Each function makes one peer's variant of a piece of work at its best: weights frozen where the peer can, its own memory
layout, all of PyTorch's threads. ONNX Runtime and OpenVINO are optional (`pip install fused_cnn[peers]`) and take the
unfused network as ONNX: what `unfuse_` and an export make of a fused one, too (examples/to_onnx.py).
"""

import copy
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..measure import Work
from ..ops._conv import IntPair, pair
from .errors import require
from .numbers import contiguous

INSTALL = "`pip install fused_cnn[peers]`"
FUSED = ("fused", "optimized", "fused graph", "fused compile", "fused dynamic", "fused package")
OURS = (*FUSED, "native", "triton")  # every other variant is a peer


# torch.compile: of the eager or of the fused network, and with which options.
COMPILERS: dict[str, tuple[str, dict[str, Any]]] = {
    "compile": ("eager", {}),
    "fused compile": ("fused", {}),
    "fused dynamic": ("fused", {"fullgraph": True, "dynamic": True}),
    "reduce-overhead": ("eager", {"mode": "reduce-overhead"}),
    "autotune": ("eager", {"mode": "max-autotune"}),
}


def compiled(
    model: nn.Module, options: Mapping[str, Any], work_of: Callable[[nn.Module], Work], *, frozen: bool
) -> Work:
    """torch.compile of a copy, compiled; frozen: with weights made part of the program. torch.compiler.reset() must not
    follow before its last call, which would compile it again, unfrozen."""
    import torch._inductor.config as config

    work = work_of(torch.compile(copy.deepcopy(model), **options))  # type: ignore[arg-type]
    with config.patch(freezing=frozen):
        work()
    return work


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    """oneDNN's fused convolution on a CPU, cuDNN's on a GPU, with the arguments of ours and weights as they are."""
    strides, padded, dilated = (list(pair(value)) for value in (stride, padding, dilation))
    if x.is_cuda:
        if not relu:
            raise NotImplementedError("cuDNN's fused calls end in a ReLU")
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, strides, padded, dilated, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, strides, padded, dilated, groups)
    op, geometry = torch.ops.mkldnn._convolution_pointwise, (padded, strides, dilated, groups)
    if residual is None:
        return op(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    return op.binary(x, residual, weight, bias, *geometry, "add", 1.0, "relu" if relu else None, [], "")


def exported(model: nn.Module, images: Tensor) -> bytes:
    """An unfused network in eval as ONNX, float32."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(contiguous(model).float(), (images,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime(onnx: bytes, images: Tensor) -> Work:
    runtime = require("onnxruntime", INSTALL)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(onnx: bytes, images: Tensor, dtype: torch.dtype) -> Work:
    core = require("openvino", INSTALL).Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype],
    }
    request = core.compile_model(core.read_model(io.BytesIO(onnx)), "CPU", settings).create_infer_request()
    feed = [images.numpy()]

    def work() -> Tensor:
        request.infer(feed)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return work


def runtimes(model: nn.Module, images: Tensor) -> dict[str, Callable[[], Work]]:
    """What makes ONNX Runtime's (float32 alone: its CPU kernels know no bfloat16) and OpenVINO's, where installed."""
    if images.device.type != "cpu" or importlib.util.find_spec("onnxscript") is None:
        return {}
    plain = images.float().contiguous()
    export = functools.cache(lambda: exported(model, plain))
    makers = {"openvino": lambda: openvino(export(), plain, images.dtype)}
    if images.dtype == torch.float32:
        makers = {"onnxruntime": lambda: onnxruntime(export(), plain), **makers}
    return {name: make for name, make in makers.items() if importlib.util.find_spec(name)}
