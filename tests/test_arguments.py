"""The registered ops of the CPU under arguments that nobody should pass: a call returns or raises, and never ends its
process. argument_fuzz.py makes the calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_cnn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's kernels")

EXAMPLES = 150  # of each op: about 20 seconds


def test_no_arguments_end_the_process(tmp_path: Path) -> None:
    tests, last = Path(__file__).parent, tmp_path / "last"
    paths = os.pathsep.join(map(str, (Path(fused_cnn.__file__).parents[1], tests)))
    command = [sys.executable, str(tests / "argument_fuzz.py"), str(last), str(EXAMPLES)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{last.read_text()}ended with {done.returncode}\n{done.stdout}{done.stderr}"
    print(done.stdout)


X = torch.ones(2, 8, 5, 5)
PACKED = torch.ops.fused_cnn.conv_bias_relu_pack(torch.ones(4, 8, 3, 3), None, [1, 1], [1, 1])
LARGEST = 2**31 - 1


def packed_conv(*geometry: list[int], weight_shape: tuple[int, ...] = (4, 8, 3, 3), packed: Tensor = PACKED) -> Tensor:
    return torch.ops.fused_cnn.conv_bias_relu_packed_fwd(X, packed, list(weight_shape), None, *geometry, True)


ABSURD = {
    "channels of gradients": (
        lambda: torch.ops.fused_cnn.concat_bias_relu_bwd(X, None, [2**62, 2**62, 8], False),
        r"channels must add up to grad_out's 8, got 4611686018427387904 where 8 are left",
    ),
    "groups": (
        lambda: torch.ops.fused_cnn.conv_bias_relu_fwd(
            X[:, :0], torch.ones(0, 4, 1, 1), None, None, [1, 1], [0, 0], [1, 1], 2**62, True
        ),
        "x has 0 channels; a weight of shape",
    ),
    "steps": (lambda: packed_conv([1, 1], [2**62, 0], [1, 1]), "must be less than 2\\^31, got 4611686018427387904"),
    "a packed weight's size": (
        lambda: packed_conv([1, 1], [1, 1], [1, 1], weight_shape=(2**58 + 4, 8, 3, 3)),
        r"fit in memory, got shape \(288230376151711748, 8, 3, 3\)",
    ),
    "reach": (
        lambda: packed_conv([LARGEST] * 2, [2**29] * 2, [2**29] * 2),
        "an image of 8 channels and, padded, 1073741829 x 1073741829 pixels is too large",
    ),
    "too few numbers": (lambda: packed_conv([1, 1], [1], [1, 1]), "fwd: padding must have two values, got 1"),
    "too many numbers": (
        lambda: torch.ops.fused_cnn.max_pool2d_fwd(X, [3, 3, 3], [2, 2], [1, 1], [1, 1], False),
        "max_pool2d_fwd: kernel must have two values, got 3",
    ),
    "scratch memory": (lambda: packed_conv([LARGEST] * 2, [2**14] * 2, [2**14] * 2), "bytes of scratch memory"),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(what: str) -> None:
    call, message = ABSURD[what]
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("size", [11, 2**20 + 1])
def test_a_pool_whose_window_is_larger_than_its_input(size: int) -> None:
    """A maximum is one of its inputs, and its gradient goes to that one alone: nothing is rounded."""
    x = torch.randn(2, 19, 6, 5, requires_grad=True)
    y = fused_cnn.ops.max_pool2d(x, kernel_size=size, stride=size // 2 - 1, padding=size // 2, backend="native")
    expected = torch.nn.functional.max_pool2d(x, size, stride=size // 2 - 1, padding=size // 2)
    grad = torch.randn_like(y)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))
