"""Compiles attention kernels for sm_90a without a GPU, and says what ptxas made of each: one JSON object a line.

Run as a script (`python sm90.py DIM ...`), a process of its own: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from farspan.kernels.estimate.units import NOTHING, PLACE_BITS, QUARTERS, STANDS_OUT, WEIGHT_BITS
from farspan.kernels.tiles import TILE
from farspan.kernels.triton.estimate import kernels as estimate
from farspan.kernels.triton.estimate.launch import WARPS
from farspan.kernels.triton.hopper import shapes
from farspan.kernels.triton.hopper.dkdv import dkdv_kernel
from farspan.kernels.triton.hopper.dq import dq_kernel
from farspan.kernels.triton.hopper.forward import forward_kernel
from farspan.kernels.triton.hopper.one_pass import one_pass_kernel
from farspan.kernels.triton.portable import backward as portable_backward
from farspan.kernels.triton.portable import forward as portable_forward
from farspan.kernels.triton.portable.columns import column_kernel
from farspan.kernels.triton.portable.shapes import Shape, column_shape, dkdv_shape, dq_shape, forward_shape

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_BOUNDS = ("begin", "end", "anchor_begin", "anchor_end")
_COLUMNS = (
    *("k_rows", "v_rows", "column_slots", "column_at", "column_first", "column_stop", "table", "row_at"),
    *("table_stride_b", "table_stride_h", "table_places", "columns_stride_b"),
    *("column_places", "dk_columns", "dv_columns", "most"),
)
_CHUNKS = ("chunks", "chunks_stride_b", "chunks_stride_h", "key_at")
_LISTS = ("full_start", "full_tiles", "partial_start", "partial_tiles", "longest_first")


def report(
    name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else signature[n] for n in names}
    # As at run time: tensors begin at multiples of 16 bytes, and so do rows of k and v.
    sixteens = [n for n, kind in kinds.items() if kind.startswith("*") or n.startswith(("k_stride", "v_stride"))]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in sixteens if kinds[n] != "constexpr"}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = (GluonASTSource if "hopper" in name else ASTSource)(kernel, kinds, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [_TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
        notes = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([_TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"(\d+) bytes spill stores", notes)
    print(
        json.dumps(
            {
                "kernel": name,
                "shared_bytes": compiled.metadata.shared,
                "spilled_bytes": int(spilled.group(1)) if spilled else None,
                "products": sass.count("HGMMA"),
                "serialized": "C75" in notes,
            }
        ),
        flush=True,
    )


def hopper_kernels(dim: int) -> None:
    for kind in ("dense", "lists", "sparse"):
        lists = kind != "dense"
        shape = shapes.forward_shape(dim, lists)
        constants: dict[str, Any] = {"LISTS": lists} | ({} if lists else dict.fromkeys((*_BOUNDS, *_LISTS)))
        constants |= {
            "ACCUMULATE": lists,
            "CONSUMERS": shape.consumers,
            "STAGES": shape.stages,
            "PRODUCER_REGISTERS": shape.producer_registers,
            "CONSUMER_REGISTERS": shape.consumer_registers,
        }
        boxes = {"q": shape.rows, "k": shape.keys, "v": shape.keys}
        hopper_kernel(f"forward {dim} {kind}", forward_kernel, dim, boxes, constants, maxnreg=shape.registers)
    for adds in (False, True):
        hopper_backward_kernels(dim, adds)


def hopper_backward_kernels(dim: int, adds: bool) -> None:
    kind = f"{dim} {'adds' if adds else 'writes'}"
    keys = {"GROUP": 4, "ACCUMULATE_DK": adds, "ACCUMULATE_DV": adds}
    for shape in {shapes.one_pass_shape(dim, causal) for causal in (False, True)}:
        boxes = {"q": shape.rows, "dout": shape.rows, "k": 64, "v": 64}
        constants = {**keys, "STAGES": shape.stages, "DS_STAGES": shape.ds_stages, "LAG": shape.lag}
        hopper_kernel(f"one pass {kind} lag {shape.lag}", one_pass_kernel, dim, boxes, constants)
    for sparse in ("", " sparse"):
        boxes = {"q": 64, "dout": 64, "k": TILE, "v": TILE}
        of_rows = {"ACCUMULATE": adds, "STAGES": shapes.dq_stages(dim)}
        hopper_kernel(f"dq {kind}{sparse}", dq_kernel, dim, boxes, of_rows)
        rows, stages = shapes.dkdv_shape()
        boxes = {"q": rows, "dout": rows, "k": 64, "v": 64}
        of_keys = {**keys, "SPARSE": bool(sparse), "STAGES": stages}
        hopper_kernel(f"dkdv {kind}{sparse}", dkdv_kernel, dim, boxes, of_keys)


def hopper_kernel(
    name: str, kernel: Any, dim: int, boxes: dict[str, int], constants: dict[str, Any], **options: int
) -> None:
    signature = _gluon_signature(kernel, dim, boxes)
    if "sparse" in name:
        signature |= {"full_start": "*i64", "partial_start": "*i64"}
    report(f"hopper {name}", kernel, signature, constants, {"num_warps": 4, **options})


def _gluon_signature(kernel: Any, dim: int, boxes: dict[str, int]) -> dict[str, str]:
    def descriptor(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, rows, 1, dim], gl.bfloat16)
        return f"tensordesc<bf16[1, {rows}, 1, {dim}],{layout!r}>"

    signature = {f"{name}_desc": descriptor(rows) for name, rows in boxes.items()}
    statistic = f"tensordesc<fp32[{boxes['q']}],{gl.NVMMASharedLayout(0, 32, rank=1)!r}>"
    return {**_scalars(kernel), "lse_desc": statistic, "delta_desc": statistic, **signature}


def portable_kernels(dim: int) -> None:
    for kind in ("dense", "lists", "sparse", "columns", "chunks"):
        walk = {"TILES": kind != "columns", "LISTS": kind != "dense", "COLUMNS": kind in ("sparse", "columns")}
        walk |= {"CHUNKS": kind == "chunks"}
        rows = {**walk, "ACCUMULATE": False}
        portable_kernel(f"forward {dim} {kind}", portable_forward.forward_kernel, dim, forward_shape(dim, 2), rows)
        portable_kernel(f"dq {dim} {kind}", portable_backward.dq_kernel, dim, dq_shape(dim, 2), rows)
        keys = {**walk, "SPARSE": walk["COLUMNS"] or walk["CHUNKS"], "ACCUMULATE_DK": False, "ACCUMULATE_DV": False}
        portable_kernel(f"dkdv {dim} {kind}", portable_backward.dkdv_kernel, dim, dkdv_shape(dim, 2), keys)
    columns = {"COLUMNS": True, "CHUNKS": False}
    portable_kernel(f"columns {dim} sparse", column_kernel, dim, column_shape(dim, 2), columns)


def portable_kernel(name: str, kernel: Any, dim: int, shape: Shape, own: dict[str, Any]) -> None:
    boxes = {"q": shape.block_m, "dout": shape.block_m, "k": shape.block_n, "v": shape.block_n}
    descriptors = {f"{x}_desc": f"tensordesc<bf16[1, 1, {rows}, {dim}]>" for x, rows in boxes.items()}
    constants = {
        **own,
        **({} if own["COLUMNS"] else dict.fromkeys(_COLUMNS)),
        **({} if own["CHUNKS"] else dict.fromkeys(_CHUNKS)),
        "GROUP": 4,
        "PRECISION": "ieee",
        "DIM": dim,
        "VALUE_DIM": dim,
        "PADDED_DIM": dim,
        "PADDED_VALUE_DIM": dim,
        "TILE": TILE,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {**_scalars(kernel), **descriptors}
    if own["COLUMNS"] or own["CHUNKS"]:
        signature |= {"full_start": "*i64", "partial_start": "*i64"}
    if kernel is column_kernel:
        signature |= {"dk": "*fp32", "dv": "*fp32"}
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    report(f"portable {name}", kernel, signature, constants, options)


def estimate_kernels(dim: int) -> None:
    signature = dict.fromkeys(("q", "k"), "*bf16") | dict.fromkeys(("ranked", "totals", "left"), "*i64")
    signature |= dict.fromkeys(("exponents", "sums", "blocks", "k_blocks", "first_block"), "*i32") | {"chosen": "*u8"}
    constants = {"GROUP": 4, "DIM": dim, "PADDED_DIM": dim, "SIZE": 64, "TILE": TILE}
    counting = {"QUARTERS": QUARTERS, "STANDS_OUT": STANDS_OUT, "PLACE_BITS": PLACE_BITS}
    own: dict[str, tuple[Any, dict[str, Any]]] = {
        "row weights": (estimate.row_weights_kernel, {"NONE": NOTHING, "UNIT": 2.0**WEIGHT_BITS}),
        "column scores": (estimate.column_scores_kernel, counting),
        "diagonal masses": (estimate.diagonal_masses_kernel, {}),
    }
    for name, (kernel, more) in own.items():
        kinds = {**_scalars(kernel), **{n: kind for n, kind in signature.items() if n in kernel.arg_names}}
        report(f"estimate {name} {dim}", kernel, kinds, constants | more, {"num_warps": WARPS})


def _scalars(kernel: Any) -> dict[str, str]:
    """Types of all arguments that are neither descriptors nor constants."""
    pointers = dict.fromkeys((*_BOUNDS, *_LISTS), "*i32") | dict.fromkeys(("out", "dq", "dk", "dv"), "*bf16")
    pointers |= {"sums": "*fp32", "counters": "*i32", "chunks": "*i32", "key_at": "*i32"}
    pointers |= dict.fromkeys(("out_base", "lse_base", "dq_base", "dk_base", "dv_base"), "*fp32")
    pointers |= dict.fromkeys(_COLUMNS, "*i32") | dict.fromkeys(("k", "v", "k_rows", "v_rows"), "*bf16")
    pointers |= dict.fromkeys(("table_stride_b", "table_stride_h", "table_places", "columns_stride_b"), "i32")
    pointers |= {"table": "*u8", "dk_columns": "*fp32", "dv_columns": "*fp32", "most": "i32"}
    pointers |= {"first_tile": "*i32", "stop_tile": "*i32"}
    pointers |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32", "scale_log2": "fp32", "unit": "fp32"}
    return {name: pointers.get(name, "i32") for name in kernel.arg_names}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        hopper_kernels(int(argument))
        portable_kernels(int(argument))
        estimate_kernels(int(argument))
