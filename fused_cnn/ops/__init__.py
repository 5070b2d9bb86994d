"""The fused ops, one folder each: op.py (the public function), reference.py (the definition of truth), triton.py, cases.py."""

from .add_relu.op import add_relu

__all__ = ["add_relu"]
