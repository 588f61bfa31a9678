"""How fast is attention, and how exact, beside the best libraries? One process, one GPU, the same inputs for all.

    python benchmarks/attention.py --lengths 8192,32768 --masks causal,documents --output attention.jsonl

Prints a table a case and appends one JSON object a peer to --output; docs/benchmarks.md says what the columns are.
On a machine without a GPU it runs the reference backend, for trying the script out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention_cases import MASKS, Answer, Case, answer
from attention_peers import LIBRARIES, CannotError, NotInstalledError, Peer, build

# Peers take turns, so that all of them meet the same clocks; a figure is the median over the rounds.
_ROUNDS = 3
# What takes longer than this is timed by one run a round, the rest by do_bench.
_LONG_MS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=_numbers, default=[8192, 32768, 131072], help="tokens, with commas")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dims", type=_numbers, default=[64, 128])
    parser.add_argument("--masks", type=_names, default=list(MASKS))
    parser.add_argument("--peers", type=_names, default=["farspan:triton", "farspan:auto", *LIBRARIES])
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="time of each kernel in one run of our backends")
    parser.add_argument("--output", type=Path, help="JSON lines are appended here")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {machine}, bf16, {options.heads} heads over {options.kv_heads}")
    for head_dim in options.head_dims:
        for mask in options.masks:
            for length in options.lengths:
                case = Case.random(mask, length, options.heads, options.kv_heads, head_dim, device)
                results = measure(case, options.peers, options.backward, options.profile)
                print_table(case, results)
                if options.output:
                    shape = {"mask": mask, "length": length, "heads": options.heads, "kv_heads": options.kv_heads}
                    setting = {"machine": machine, "torch": torch.__version__, **shape, "head_dim": head_dim}
                    with options.output.open("a") as file:
                        file.writelines(json.dumps(setting | result) + "\n" for result in results)


def measure(case: Case, names: list[str], backward: bool, profile: bool) -> list[dict[str, Any]]:
    """One result a peer; one that cannot run says why in `status`."""
    right = answer(case)
    started = [start(name, case, right, backward) for name in names]
    running = [(peer, result) for peer, result in started if peer is not None]
    passes = ("forward", "backward") if backward else ("forward",)
    for name in passes:
        for peer, _ in running:
            getattr(peer, name)()  # with caches as every later run finds them
        times = [[milliseconds(getattr(peer, name), case.q.is_cuda) for peer, _ in running] for _ in range(_ROUNDS)]
        for (_, result), rounds in zip(running, zip(*times)):
            result[f"{name}_ms"] = statistics.median(rounds)
    add_rates(case, [result for _, result in running], passes)
    if profile:
        for peer, result in running:
            if result["peer"].startswith("farspan:"):
                print_profile(result["peer"], peer, backward)
    return [result for _, result in started]


def start(name: str, case: Case, right: Answer, backward: bool) -> tuple[Peer | None, dict[str, Any]]:
    """The peer, compiled, and its result so far: the errors of its first run. Without a peer, `status` says why."""
    status = "ok"
    try:
        peer = build(name, case)
        out = peer.forward()
        errors = right.errors(out, peer.backward() if backward else None)
        return peer, {"peer": name, "status": status, "errors": errors, "block_mask_ms": peer.block_mask_ms}
    except CannotError:
        status = "cannot say this mask"
    except NotInstalledError:
        status = "not installed"
    except Exception as error:  # a peer that breaks is a result as well, and must not end the others' run
        status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        if case.q.is_cuda:
            torch.cuda.empty_cache()
    return None, {"peer": name, "status": status}


def milliseconds(run: Callable[[], Any], cuda: bool) -> float:
    if not cuda:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    from triton.testing import do_bench

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    once = begin.elapsed_time(end)
    return once if once > _LONG_MS else do_bench(run, warmup=25, rep=100, return_mode="median")


def add_rates(case: Case, results: list[dict[str, Any]], passes: tuple[str, ...]) -> None:
    """TFLOP/s over visible pairs, ratios to the fastest library, and errors in units of cuDNN's."""
    for result in results:
        result["forward_tflops"] = case.flops / result["forward_ms"] / 1e9
        if "backward" in passes:
            result["backward_tflops"] = 2.5 * case.flops / result["backward_ms"] / 1e9
            result["both_ms"] = result["forward_ms"] + result["backward_ms"]
    libraries = [result for result in results if result["peer"] in LIBRARIES]
    cudnn = next((result for result in libraries if result["peer"] == "cudnn"), None)
    for result in results:
        for name in (*passes, *(["both"] if "backward" in passes else [])):
            if libraries:
                best = min(library[f"{name}_ms"] for library in libraries)
                result[f"{name}_ratio"] = best / result[f"{name}_ms"]
        if cudnn:
            result["error_ratio"] = max(result["errors"][key] / cudnn["errors"][key] for key in cudnn["errors"])


def print_table(case: Case, results: list[dict[str, Any]]) -> None:
    _, length, heads, head_dim = case.q.shape
    print(
        f"\n{case.mask_name}, {length:,} tokens, {heads}/{case.k.shape[2]} heads x {head_dim}, "
        f"{case.mask.area() / length**2:.1%} of all pairs; ratios are to the fastest library"
    )
    columns = ("forward ms", "TFLOP/s", "ratio", "backward ms", "TFLOP/s", "ratio", "both", "error", "x cuDNN")
    print(f"{'peer':<16}" + "".join(f"{column:>12}" for column in columns))
    for result in results:
        if result["status"] != "ok":
            print(f"{result['peer']:<16}  {result['status']}")
            continue
        keys = ("forward_ms", "forward_tflops", "forward_ratio", "backward_ms", "backward_tflops", "backward_ratio")
        values = [result.get(key) for key in (*keys, "both_ratio")]
        cells = [f"{'' if value is None else format(value, '.3f'):>12}" for value in values]
        worst, ratio = max(result["errors"].values()), result.get("error_ratio")
        cells += [f"{worst:>12.2e}", f"{'' if ratio is None else format(ratio, '.3f'):>12}"]
        extra = result["block_mask_ms"]
        print(f"{result['peer']:<16}{''.join(cells)}" + (f"  (block mask {extra:.1f} ms)" if extra else ""), flush=True)


def print_profile(name: str, peer: Peer, backward: bool) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = peer.case.q.is_cuda
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        peer.forward()
        if backward:
            peer.backward()
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    spent = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profiled.key_averages()
        if event.device_type == kind
    ]
    total = sum(time_us for time_us, _, _ in spent)
    print(f"\n{name}, {peer.case.mask_name}, {peer.case.q.shape[1]:,} tokens: {total / 1e3:.3f} ms in kernels")
    for time_us, count, key in sorted(spent, reverse=True)[:12]:
        print(f"  {time_us / total:6.1%} {time_us / 1e3:10.3f} ms {count:5} x  {key[:80]}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
