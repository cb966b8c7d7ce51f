"""Build a model whose weights lie in slabs: on the meta device first, then unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmkit import model as models
from bmkit.nn.rounding import quantize
from bmkit.plan import TensorHeader
from bmkit.runtime.budget import block_of
from bmkit.runtime.cpu import pack
from bmkit.runtime.cpu.dots import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8
from bmkit.runtime.cpu.pack import Layout, Shape
from bmkit.runtime.placed.matrix import (
    FLOATS,
    Matrix,
    PackedConv1D,
    PackedEmbedding,
    PackedLinear,
    Stack,
    embedding_class,
)
from bmkit.runtime.placed.origin import Origin
from bmkit.runtime.placed.unit import Dense, Packed, Unit, nothing

GROUP = 64
"""Inputs that share a scale, of weights that are rounded to 4 bits while they are loaded."""

T5_OUT = ".DenseReluDense.wo"
"""A linear layer of the T5 family, whose code asks each time for its weight's dtype."""

Write = Callable[[Layout, int, np.ndarray], None]


def empty(path: Path) -> Any:
    """Build the checkpoint's model with parameters on the meta device, buffers real."""
    config = copy.deepcopy(models.load_config(path))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return build(models.auto_class(config), config)


def build(kind: Any, config: Any) -> Any:
    """Build a model of an Auto class with parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        make = getattr(kind, "from_config", None) or kind._from_config
        model = make(config, dtype=torch.float32).eval()
    model.tie_weights()
    model.requires_grad_(False)
    return model


def warm() -> None:
    """Compile the product, or read it from where it is kept, before any model is opened."""
    matrix = Matrix(
        Shape(FLOAT32, 1, 32), np.empty(0, np.int64), torch.float32, torch.device("cpu")
    )
    unit = Unit("warm", torch.device("cpu"))
    unit.packed.append(Packed(matrix, lambda layout, row, slab: None))
    unit.close()
    matrix.bind(torch.zeros(unit.bytes, dtype=torch.uint8))
    with torch.inference_mode():
        matrix.multiply(torch.zeros(1, 32))


class Builder:
    """Takes a model on the meta device apart into units, and puts packed modules into it."""

    def __init__(
        self,
        model: Any,
        origin: Origin,
        device: torch.device,
        dtype: torch.dtype,
        quant: str | None,
    ) -> None:
        self.model, self.origin, self.device, self.dtype = model, origin, device, dtype
        self.quant = quant
        self.bits = {None: None, "int8": 8, "int4": 4}[quant]
        self.modules = dict(model.named_modules())
        self.blocks: dict[str, Unit] = {}
        self.rest = Unit("", device)
        self.matrices: dict[int, Matrix] = {}  # by the identity of the parameter on meta
        self.parameters: dict[int, tuple[Dense, nn.Parameter]] = {}
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.aliases = names
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = head if type(head) is nn.Linear else None
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        self.table = getattr(embedding, "weight", None)  # the parameter whose rows are looked up

    def unit(self, name: str) -> Unit:
        """Return the unit of a parameter."""
        block = block_of(name)
        parent = self.modules.get(block.rpartition(".")[0]) if block else None
        if block is None or not isinstance(parent, nn.ModuleList):
            return self.rest
        if block not in self.blocks:
            self.blocks[block] = Unit(block, self.device)
        return self.blocks[block]

    def stored(self, parameter: Tensor) -> str | None:
        """Return the name under which the files hold a parameter; None if they don't."""
        return next((n for n in self.aliases[id(parameter)] if self.origin.holds(n)), None)

    def build(self) -> None:
        """Replace every module that can be packed, and every other parameter by one of a unit."""
        for name, module in self.modules.items():
            if name and module is not self.head:
                self._pack(name, module)
        for name, module in list(self.model.named_modules()):
            if module is self.head:
                continue
            for attribute, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.device.type == "meta":
                    self._keep(f"{name}.{attribute}" if name else attribute, module, attribute)
            for attribute, buffer in list(module._buffers.items()):
                whole = f"{name}.{attribute}" if name else attribute
                if buffer is not None and self.origin.holds(whole):
                    module._buffers[attribute] = self.origin.tensor(whole).to(buffer.dtype)
                if buffer is not None:
                    module._buffers[attribute] = module._buffers[attribute].to(self.device)

    def _pack(self, name: str, module: nn.Module) -> None:
        from transformers.pytorch_utils import Conv1D

        weight = module._parameters.get("weight")
        if type(module) is nn.Linear and weight is not None:
            shape = self.shape(weight, self.bits)
            if shape is not None:
                matrix = self._matrix(name, weight, shape, module._parameters.get("bias"))
                packed = PackedLinear(matrix)
                packed.asked_for_dtype = name.endswith(T5_OUT)
                self.replace(name, packed)
        elif type(module) is Conv1D and weight is not None:
            shape = self.shape(weight.T, self.bits, self.stored(weight))
            if shape is not None:
                bias = module._parameters.get("bias")
                matrix = self._matrix(name, weight, shape, bias, transposed=True)
                self.replace(name, PackedConv1D(matrix))
        elif isinstance(module, nn.Embedding) and weight is self.table:
            self._embedding(name, module)
        elif "Experts" in type(module).__name__ and hasattr(module, "config"):
            self._experts(name, module)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` where the model has one of that name."""
        parent, _, attribute = name.rpartition(".")
        module.train(False)
        setattr(self.model.get_submodule(parent), attribute, module)

    def shape(self, weight: Tensor, bits: int | None, name: str | None = None) -> Shape | None:
        """Say how a matrix is packed; None if the files don't hold it."""
        name = name or self.stored(weight)
        if name is None:
            return None
        if (shape := self.origin.packed_shape(name)) is not None:
            return replace(shape, bias=False)
        rows, inputs = weight.shape
        if bits is not None:
            return _rounded(bits, rows, inputs)
        return Shape(self.kind(name), rows, inputs)

    def kind(self, stored: str) -> int:
        """Return how floats are kept: on the CPU bfloat16 as stored, else in the compute dtype."""
        if self.dtype == torch.float32 and self.device.type == "cpu":
            return BFLOAT16 if self.origin.dtype(stored) == torch.bfloat16 else FLOAT32
        return next(kind for kind, dtype in FLOATS.items() if dtype == self.dtype)

    def _matrix(
        self,
        name: str,
        weight: Tensor,
        shape: Shape,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> Matrix:
        own = None if bias is None else self.stored(bias)
        shape = replace(shape, bias=own is not None)
        matrix = Matrix(shape, np.empty(0, np.int64), self.dtype, self.device)
        if (stored := self.stored(weight)) is not None:
            matrix.rounding = self.origin.rounding(stored)
        unit = self.unit(name + ".weight")
        write = self.writer(weight, shape, own, transposed=transposed)
        header = None if transposed else self.mappable(weight, shape)
        offset = None if own is None else (lambda: self.origin.tensor(own).float())
        unit.packed.append(Packed(matrix, write, header, offset))
        self.matrices[id(weight)] = matrix
        return matrix

    def mappable(self, weight: Tensor, shape: Shape) -> TensorHeader | None:
        """Return the stored tensor that holds a matrix as it is computed with, if there is one."""
        stored = self.stored(weight)
        header = None if stored is None else self.origin.header(stored)
        if header is None or shape.width != shape.inputs:
            return None
        kind = {"F32": FLOAT32, "BF16": BFLOAT16}.get(header.dtype)
        return header if kind == shape.kind else None

    def writer(
        self,
        weight: Tensor,
        shape: Shape,
        bias: str | None = None,
        *,
        low: int = 0,
        transposed: bool = False,
    ) -> Write:
        """Return what puts a matrix into a slab: the rows of a stored one from `low` on."""
        stored = self.stored(weight)
        assert stored is not None  # `shape` has asked
        high = low + shape.rows

        def write(layout: Layout, row: int, slab: np.ndarray) -> None:
            if bias is not None:
                offset = self.origin.tensor(bias)[low:high].float().contiguous()
                layout.part(slab, row, 2)[:] = offset.numpy().view(np.uint8)
            place = torch.from_numpy(layout.part(slab, row, 0)).view(shape.rows, -1)
            if shape.kind in FLOATS:
                values = place.view(FLOATS[shape.kind])
                values[:, shape.inputs :] = 0
                out = values[:, : shape.inputs]
                self.origin.read_into(stored, out, low=low, transposed=transposed)
                return
            into = torch.from_numpy(layout.part(slab, row, 1)).view(torch.float32)
            into = into.view(shape.rows, -1)
            if self.origin.packed_shape(stored) is not None:
                packed = self.origin.integers(stored)
                assert packed.scales is not None  # integers have them
                place[:] = torch.from_numpy(packed.data[low:high])
                into[:] = torch.from_numpy(packed.scales[low:high])
                return
            for at, part in self.origin.parts(stored, shape, low=low, transposed=transposed):
                packed = _pack(part, shape)
                assert packed.scales is not None  # as above
                place[at : at + len(part)] = torch.from_numpy(packed.data)
                into[at : at + len(part)] = torch.from_numpy(packed.scales)

        return write

    def _embedding(self, name: str, module: nn.Embedding) -> None:
        weight = module._parameters["weight"]
        assert weight is not None  # an embedding has one
        shape = self.shape(weight, None if self.bits is None else 8)
        if shape is None or shape.kind not in (BFLOAT16, FLOAT16, FLOAT32, INT8):
            return
        if id(weight) not in self.matrices:
            nowhere = np.empty(0, np.int64)
            self.matrices[id(weight)] = Matrix(shape, nowhere, self.dtype, self.device)
        del module._parameters["weight"]
        module.__class__ = embedding_class(type(module))
        assert isinstance(module, PackedEmbedding)  # as just said
        module.matrix = self.matrices[id(weight)]

    def _experts(self, name: str, module: nn.Module) -> None:
        for attribute, parameter in list(module._parameters.items()):
            stored = None if parameter is None else self.stored(parameter)
            if parameter is None or stored is None or parameter.ndim != 3:
                continue
            count, rows, inputs = parameter.shape
            if self.bits is not None:
                shape = _rounded(self.bits, count * rows, inputs)
            else:
                shape = Shape(self.kind(stored), count * rows, inputs)
            matrix = self._matrix(f"{name}.{attribute}", parameter, shape)
            del module._parameters[attribute]
            module.__dict__[attribute] = Stack(matrix, count)
            config: Any = module.config
            config._experts_implementation = "eager"

    def _keep(self, name: str, module: nn.Module, attribute: str) -> None:
        """Make a parameter one that is bound to a unit's slab, in the compute dtype."""
        meta = module._parameters[attribute]
        assert meta is not None  # the caller has it
        if id(meta) not in self.parameters:
            stored = self.stored(meta)
            dtype = self.dtype if meta.is_floating_point() else meta.dtype

            def write(out: np.ndarray) -> None:
                assert stored is not None  # missing parameters are refused before
                self.origin.read_into(stored, torch.from_numpy(out).view(dtype).view(meta.shape))

            made = nn.Parameter(nothing(meta.shape, dtype, self.device), requires_grad=False)
            tensor = Dense(meta.shape, dtype, write, [made])
            self.unit(name).dense.append(tensor)
            self.parameters[id(meta)] = (tensor, made)
        module._parameters[attribute] = self.parameters[id(meta)][1]


def _rounded(bits: int, rows: int, inputs: int) -> Shape:
    group = None
    if bits == 4:
        group = next((g for g in (GROUP, 32) if inputs % g == 0), None)
    return Shape(INT8 if bits == 8 else INT4, rows, inputs, group)


def _pack(weight: Tensor, shape: Shape) -> pack.Packed:
    bits = 8 if shape.kind == INT8 else 4
    values, scale = quantize(weight, bits, shape.group)
    found = pack.pack_integers(values, scale, bits)
    assert found is not None  # `_rounded` chooses groups that can be read
    return found
