"""A model's context is extended with dense and with sparse attention: the same start, the same tokens. What is lost?

    python benchmarks/extension.py --folder extension --lengths 256,4096,32768 --steps 1000,400,800 --plot extension.png

The text is the sources of Python's standard library and of PyTorch in long documents, with needles: here and there a
comment has a key and two words for it, drawn for this document, and behind it, at distances of all scales, the comment
is there again. A small decoder learns rows of each of `--lengths` but the last, one after the other, for to look
something up is learnt in short rows. From its weights runs learn rows of the last length, one with dense attention and
one for each of `--sparse`, side by side where there are several GPUs. Then all are asked, with dense attention, for the
words of needles in unread texts as long as their rows: the share of needles whose two words they say is the recall. A
call that was cut off goes on where it is made again, with the runs' checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml

from farspan.data.prepared import load_prepared
from farspan.data.tokenizer import Tokenizer
from farspan.models import prefill
from farspan.models.reader import Reader
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.trainer.checkpoint.weights import newest_decoder
from farspan.trainer.config_file import load_run_config
from farspan.trainer.preflight import with_vocabulary
from farspan.trainer.process_group import start_process_group

_NEEDLE_CHARACTERS = 1800  # one needle in so many
_AGAIN = 12  # times that a needle of a training text is there again
_SYLLABLES = ("ba", "di", "fo", "gu", "ka", "li", "mo", "nu", "pe", "ra", "si", "to")
_WORDS = tuple(first + second for first in _SYLLABLES for second in _SYLLABLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("extension"))
    parser.add_argument("--lengths", type=numbers, default=[256, 4096, 32768])
    parser.add_argument("--steps", type=numbers, default=[1000, 400, 800], help="on rows of each length")
    parser.add_argument("--tokens-per-step", type=int, default=65_536)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=1e9, help="of text, at most")
    parser.add_argument(
        "--sparse", action="append", help="keys of attention.sparse, with commas; by default mass=0.9, and mass=0.95"
    )
    parser.add_argument("--texts", type=int, default=8, help="unread texts, each with 32 questions")
    parser.add_argument("--plot", type=Path, help="picture of the runs; needs matplotlib")
    parser.add_argument("--results", type=Path, help="draw those of an earlier call (its results.json) alone")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(Path(options.ask[0]), Path(options.ask[1]))
        return
    if options.results:
        if not options.plot:
            parser.error("--results is drawn: give --plot")
        plot(json.loads(options.results.read_text()), options.plot)
        return
    folder: Path = options.folder
    begin(folder, options)
    variants = variants_of(options)
    configurations(folder, options, variants)
    stages = [str(length) for length in options.lengths[:-1]]
    command(folder, "prepare", stages[0])
    for stage in stages:
        command(folder, "train", stage)
    print(f"before: {recall(asked(folder, stages[-1], 0))}, in texts of {stages[-1]} tokens", flush=True)
    gpus: SimpleQueue[int] = SimpleQueue()
    for gpu in range(max(1, torch.cuda.device_count())):
        gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        results = dict(zip(variants, pool.map(lambda variant: extend(folder, variant, gpus), variants), strict=True))
    (folder / "results.json").write_text(json.dumps(results))
    report(results)
    if options.plot:
        plot(results, options.plot)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def variants_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Their `attention` by name."""
    variants: dict[str, dict[str, Any]] = {"dense": {}}
    for keys in options.sparse or ["mass=0.9", "mass=0.95"]:
        given = yaml.safe_load(f"{{{keys.replace('=', ': ')}}}")
        variants[keys.replace("=", "_")] = {"sparse": {"report_every": max(1, options.steps[-1] // 15), **given}}
    return variants


def begin(folder: Path, options: argparse.Namespace) -> None:
    """Texts are written once; what runs in the folder began with must not change."""
    names = ("lengths", "steps", "tokens_per_step", "hidden", "layers", "megabytes", "texts")
    settings, file = {name: getattr(options, name) for name in names}, folder / "settings.json"
    if not file.exists():
        write_texts(folder, options)
        file.write_text(json.dumps(settings))
    if json.loads(file.read_text()) != settings:
        raise SystemExit(f"{folder} was begun with {file.read_text()}: give these again, or another --folder")


def write_texts(folder: Path, options: argparse.Namespace) -> None:
    """`text/`: documents a little longer than long rows; `asked/`: others, with their needles beside them."""
    draw = random.Random(0)
    standard, torch_folder = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    files = [file for file in standard.rglob("*.py") if "site-packages" not in file.parts]
    files = sorted({*files, *torch_folder.rglob("*.py")})
    sources = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    draw.shuffle(sources)
    whole = "\n".join(sources)[: int(options.megabytes * 1e6)]
    size = 4 * options.lengths[-1]  # some four characters are a token
    for kind in ("text", "asked"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir(parents=True)
    for number, start in enumerate(range(0, len(whole), size)):
        asked = number < options.texts
        text, needles = with_needles(whole[start : start + size], draw, again=0 if asked else _AGAIN)
        if asked:
            (folder / "asked" / f"{number}.txt").write_text(text, encoding="utf-8")
            (folder / "asked" / f"{number}.json").write_text(json.dumps(needles))
        else:
            (folder / "text" / f"{number:05}.py").write_text(text, encoding="utf-8")


def with_needles(text: str, draw: random.Random, again: int) -> tuple[str, dict[str, str]]:
    """The text with needles between its lines, and what they are; each is there `again` so many times, later."""
    lines = text.split("\n")
    keys = draw.sample(_WORDS, min(len(_WORDS) // 2, max(2, len(text) // _NEEDLE_CHARACTERS)))
    needles = {key: " ".join(draw.sample(_WORDS, 2)) for key in keys}
    added = []
    for key, words in needles.items():
        first = draw.randrange(len(lines))
        # Distances of all magnitudes are equally likely.
        places = [first, *(first + int(len(lines) ** draw.random()) for _ in range(again))]
        added += [(place, f"{sentence(key)} {words}") for place in places]
    for place, line in sorted(added, reverse=True):
        if place <= len(lines):
            lines.insert(place, line)
    return "\n".join(lines), needles


def sentence(key: str) -> str:
    return f"# recall {key}"


def configurations(folder: Path, options: argparse.Namespace, variants: dict[str, dict[str, Any]]) -> None:
    heads = options.hidden // 64
    common: dict[str, Any] = {
        "model": {
            "hidden_size": options.hidden,
            "layers": options.layers,
            "heads": heads,
            "kv_heads": max(1, heads // 2),
            "head_dim": 64,
            "feed_forward_size": options.hidden * 11 // 4,
            "tied_embeddings": True,
        },
        "data": {
            "sources": [str(folder / "text")],
            "directory": str(folder / "prepared"),
            "vocabulary_size": 4096,
            "heldout_fraction": 0.02,
            "processes": os.cpu_count() or 1,
        },
        "train": {"tokens_per_step": options.tokens_per_step, "dtype": "bf16" if torch.cuda.is_available() else "fp32"},
        "launch": {"processes": 1},
        "parallel": {"plan": "single", "order": "contiguous"},
        "eval": {"rows": 16},
    }
    stages: dict[str, dict[str, Any]] = {}
    *short, long = zip(options.lengths, options.steps, strict=True)
    before, before_length = None, short[0][0]
    for length, steps in short:
        stages[str(length)] = stage(folder, length, steps, 1.5e-3, before)
        before, before_length = str(length), length
    for variant, attention in variants.items():
        stages[variant] = stage(folder, *long, 5e-4, before) | {"attention": attention}
        # Rotary frequencies slow down with the length of rows, and some more.
        stages[variant]["model"] = {"rotary_theta": 10_000.0 * 2 * long[0] / before_length}
    for name, sections in stages.items():
        # All rows of a step at once: small models are bound by the host otherwise.
        sections["train"]["micro_batch_rows"] = options.tokens_per_step // sections["train"]["sequence_length"]
        tree = {"run": {}, **common}
        for section, keys in sections.items():
            tree[section] = {**tree.get(section, {}), **keys}
        tree["run"] = {**tree["run"], "dir": str(folder / "runs" / name), "seed": 1}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def stage(folder: Path, length: int, steps: int, rate: float, before: str | None) -> dict[str, dict[str, Any]]:
    """Sections of a run on rows of a length, which begins with the weights of another one."""
    run = {} if before is None else {"weights_from": str(folder / "runs" / before)}
    optimizer = {"schedule": "cosine", "learning_rate": rate, "warmup_steps": max(1, steps // 20)}
    checkpoint = {"every": max(1, steps // 4), "keep": 1}
    train = {"steps": steps, "sequence_length": length}
    return {"run": run, "train": train, "optimizer": optimizer, "checkpoint": checkpoint}


def extend(folder: Path, variant: str, gpus: SimpleQueue[int]) -> dict[str, Any]:
    gpu = gpus.get()
    try:
        command(folder, "train", variant, gpu)
        answers = asked(folder, variant, gpu)
    finally:
        gpus.put(gpu)
    lines = (folder / "runs" / variant / "metrics.jsonl").read_text().splitlines()
    return {"metrics": [json.loads(line) for line in lines], **answers}


def asked(folder: Path, name: str, gpu: int) -> dict[str, Any]:
    answers = folder / f"{name}.json"
    run([sys.executable, __file__, "--folder", str(folder), "--ask", str(folder / "runs" / name), str(answers)], gpu)
    found: dict[str, Any] = json.loads(answers.read_text())
    return found


def command(folder: Path, verb: str, name: str, gpu: int = 0) -> None:
    run([sys.executable, "-m", "farspan.launch.command", verb, str(folder / f"{name}.yaml")], gpu)


def run(arguments: list[str], gpu: int) -> None:
    print(" ".join(arguments[1:]), flush=True)
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    device = given.split(",")[gpu] if given else str(gpu)
    subprocess.run(arguments, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": device}, stdout=sys.stderr)


def ask(folder: Path, answers: Path) -> None:
    """Writes the recall of the run in `folder`, and by how many quarters of the text the needle is behind."""
    config = load_run_config(folder)
    data = load_prepared(config.data.directory)
    mesh = Mesh.create(Degrees(1, 1, 1), start_process_group(600))
    tokenizer = Tokenizer(data.tokenizer_path)
    model_config = with_vocabulary(config, data)
    model = newest_decoder(folder, config, model_config, mesh, print)
    length, heads = config.train.sequence_length - 64, model_config.heads_of_rank(1)
    found: list[list[bool]] = [[], [], [], []]
    for file in sorted((folder.parents[1] / "asked").glob("*.txt")):
        tokens = tokenizer.encode(file.read_text(encoding="utf-8"))[:length].tolist()
        text = tokenizer.decode(tokens)
        needles: dict[str, str] = json.loads(file.with_suffix(".json").read_text())
        places = {key: text.find(f"{sentence(key)} {words}\n") for key, words in needles.items()}
        reader = Reader(model, mesh)
        reader.prefill(tokens, prefill.dense(len(tokens), mesh, heads))
        here = [key for key, place in places.items() if place >= 0]
        for key in random.Random(0).sample(here, min(32, len(here))):
            quarter = 4 * (len(text) - places[key]) // (len(text) + 1)
            question = f"\n{sentence(key)}"
            begun, whole = (tokenizer.encode(x).tolist() for x in (question, f"{question} {needles[key]}"))
            # Greedy decoding would say the words, if each of their tokens is the likeliest one behind those before it.
            hidden = reader.read(whole[:-1])[len(begun) - 1 :]
            likeliest = (model.norm(hidden) @ model.output_weight.T).argmax(-1).tolist()
            found[quarter].append(likeliest == whole[len(begun) :])
            reader.back_to(len(tokens))
    everything = [x for quarter in found for x in quarter]
    found_at: dict[str, Any] = {"recall": sum(everything) / len(everything), "asked": len(everything)}
    found_at |= {"recall_by_quarter": [sum(x) / len(x) if x else None for x in found]}
    answers.write_text(json.dumps(found_at))
    mesh.destroy()
    dist.destroy_process_group()


def report(results: dict[str, dict[str, Any]]) -> None:
    for variant, result in results.items():
        last = result["metrics"][-1]
        sparse: dict[str, float] = next((m for m in reversed(result["metrics"]) if "sparse_density" in m), {})
        cells = [f"held-out loss {last['eval_loss']:.4f}", f"train loss {last['loss']:.4f}"]
        cells += [recall(result), f"{last['step_seconds']:.3f} s a step"]
        cells += [f"{name} {sparse[name]:.3f}" for name in ("sparse_density", "sparse_recall") if name in sparse]
        print(f"{variant:9} {'  '.join(cells)}", flush=True)


def recall(answers: dict[str, Any]) -> str:
    quarters = ", ".join("-" if share is None else f"{share:.0%}" for share in answers["recall_by_quarter"])
    return f"needles {answers['recall']:.1%} of {answers['asked']} (by quarters of distance {quarters})"


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (losses, ratios), (shares, recalls) = figure.subplots(2, 2)
    dense = losses_of(results["dense"])
    window = 1 + len(results["dense"]["metrics"]) - len(dense)
    width = 0.8 / len(results)
    for i, (variant, result) in enumerate(results.items()):
        steps, loss, color = [m["step"] for m in result["metrics"]][window - 1 :], losses_of(result), f"C{i}"
        losses.plot(steps, loss, color, label=variant, lw=1)
        if variant != "dense":
            ratios.plot(steps, 100 * (loss / dense - 1), color, lw=1)
        for name, style in (("sparse_density", "-"), ("sparse_recall", "o")):
            reports = [m for m in result["metrics"] if name in m]
            shares.plot([m["step"] for m in reports], [m[name] for m in reports], style, color=color, lw=1)
        found = [share or 0 for share in result["recall_by_quarter"]]
        recalls.bar([quarter + i * width for quarter in range(4)], found, width, color=color)
    losses.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    losses.legend()
    ratios.set(xlabel="step", ylabel="training loss above dense, %")
    shares.set(xlabel="step", ylabel="tiles computed (line), attention covered (dots)", ylim=(0, 1))
    recalls.set(xlabel="quarters of the text that lie between", xticks=range(4), ylabel="needles found", ylim=(0, 1))
    figure.savefig(file, dpi=110)


def losses_of(result: dict[str, Any]) -> np.ndarray:
    """Of the training steps: running means over a twentieth of them."""
    losses = np.array([m["loss"] for m in result["metrics"]])
    return np.lib.stride_tricks.sliding_window_view(losses, max(1, len(losses) // 20)).mean(-1)


if __name__ == "__main__":
    main()
