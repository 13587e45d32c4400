"""What no analysis looks into: stages that passes make, searches and sorts, new tensors of a size."""

from __future__ import annotations

from splitfx.ir.ops.row import Result, rows

rows("tiled")
rows("entry", result=Result.OPERAND)
rows("cumsum topk sort argsort gather", per_output=1)
rows("sym_size arange full zeros ones scalar_tensor new_zeros new_ones")
rows("empty", stored=False)  # memory as it was left is no value
