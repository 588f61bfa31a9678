"""Which rank holds which tokens, who sends what to whom, and the one executor of it."""

from farspan.parallel.huggingface import BatchSharder, attention_function, attention_mask

__all__ = ["BatchSharder", "attention_function", "attention_mask"]
