"""The peer of `step.py`: what a user would pick instead for one GPU.

Hugging Face's Qwen2 of the same shape, Liger kernels with the fused linear cross-entropy, cuDNN attention through
torch, every layer recomputed, DeepSpeed ZeRO-1 in bf16 with fp32 master weights, torch's fused AdamW. Each step takes
the same row of text and the same labels as ours; the loss is the mean over them.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext, redirect_stdout

import torch
from step_measure import WARM_UP_LENGTH, Split, Stopwatch
from torch import nn

from farspan.data.concatenated import ConcatRows
from farspan.data.corpus import Corpus
from farspan.data.sampling import sample_index
from farspan.models.config import ModelConfig
from farspan.trainer.config import RunConfig
from farspan.trainer.preflight import Preflight


class HuggingFace:
    def __init__(self, config: RunConfig, preflight: Preflight, device: torch.device) -> None:
        import deepspeed

        self.device, self.seed = device, config.run.seed
        self.further: dict[str, float] = {}
        self.corpus = Corpus(preflight.prepared, "train")
        # Liger's kernels need a GPU; without one only the script is tried out, and there is nothing to compare.
        self.liger = device.type == "cuda"
        model = self._model(preflight.model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if self.parameters != preflight.model.parameters():
            raise SystemExit(
                f"the peer is a Qwen2 of {self.parameters:,} weights, but model.preset has "
                f"{preflight.model.parameters():,}; take a preset of the Qwen2 family (model.qkv_bias)"
            )
        settings = config.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled, for minutes
        with redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config={
                    "train_batch_size": 1,
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": 1},
                    "gradient_clipping": settings.gradient_clipping,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    "steps_per_print": 2**31,
                },
                dist_init_required=False,
            )

    def warm_up(self, length: int) -> None:
        self.steps(WARM_UP_LENGTH, 2, Stopwatch(self.device))

    def steps(self, length: int, count: int, stopwatch: Stopwatch) -> float:
        rows = ConcatRows(self.corpus, length, self.seed)
        loss = torch.tensor(float("nan"))
        stopwatch.start()
        for number in range(count):
            row = rows[sample_index(self.seed, number, len(rows))]
            tokens, labels = (torch.from_numpy(x)[None].to(self.device) for x in (row.tokens, row.labels))
            with self._attention():
                # The labels are shifted already; `labels` beside them only says that a loss is wanted.
                loss = self.engine(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
                self.engine.backward(loss)
            self.engine.step()
            stopwatch.lap()
        return float(loss.detach())

    def watch(self, split: Split) -> None:
        split.forward_and_backward(nn.functional, "scaled_dot_product_attention", "attention")
        split.call(self.engine, "step", "optimizer")
        if self.liger:
            from liger_kernel.transformers.model import qwen2

            split.forward_and_backward(qwen2, "LigerForCausalLMLoss", "loss")

    def _attention(self) -> AbstractContextManager[None]:
        if self.device.type == "cpu":
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)

    def _model(self, shape: ModelConfig) -> nn.Module:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        if self.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2

            apply_liger_kernel_to_qwen2()
        config = Qwen2Config(
            vocab_size=shape.vocabulary_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.feed_forward_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=2**20,
            rms_norm_eps=shape.norm_epsilon,
            tie_word_embeddings=shape.tied_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_theta},
            attn_implementation="sdpa",
        )
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = Qwen2ForCausalLM(config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()
