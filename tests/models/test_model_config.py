"""The model section: presets as published, and shapes that cannot be are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from farspan.models.config import ModelConfig, load_preset, preset_names

SHAPE = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "feed_forward_size": 48}

# From the safetensors indexes of the published models.
PUBLISHED = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-3b": 3_085_938_688, "llama-3.1-8b": 8_030_261_248}


@pytest.mark.parametrize(("preset", "parameters"), list(PUBLISHED.items()))
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    assert ModelConfig.model_validate({"preset": preset}).parameters() == parameters


def test_every_preset_is_a_model() -> None:
    assert set(preset_names()) >= {"tiny", "160m", *PUBLISHED}
    for name in preset_names():
        config = ModelConfig.model_validate({"preset": name})
        assert config.preset == name
        assert config.model_fields_set == {"preset", *load_preset(name)}
        if config.vocabulary_size is None:
            config = config.model_copy(update={"vocabulary_size": 32_000})
        config.check_tensor_degree(1)
        assert config.parameters() > 0


def test_the_sizes_in_the_names_of_our_own_presets_are_true() -> None:
    def parameters(preset: str, vocabulary_size: int) -> int:
        return ModelConfig.model_validate({"preset": preset, "vocabulary_size": vocabulary_size}).parameters()

    assert 150e6 < parameters("160m", 32_000) < 170e6
    assert parameters("tiny", 2048) < 5e6


def test_what_is_given_beside_a_preset_takes_precedence() -> None:
    preset = ModelConfig.model_validate({"preset": "qwen2.5-0.5b"})
    given = ModelConfig.model_validate({"preset": "qwen2.5-0.5b", "layers": 3, "qkv_bias": False})
    assert (given.layers, given.qkv_bias) == (3, False)
    assert given == preset.model_copy(update={"layers": 3, "qkv_bias": False})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"preset": "qwen-3b"},
            r"there is no model\.preset 'qwen-3b'; did you mean 'qwen2\.5-3b'\? possible are 160m, ",
        ),
        ({"preset": "zzz"}, r"there is no model\.preset 'zzz'; possible are 160m, llama"),
        ({**SHAPE, "heads": 5}, r"model\.heads 5 must be a multiple of model\.kv_heads 2"),
        ({**SHAPE, "head_dim": 7}, "multiple of 2"),
        ({**SHAPE, "layers": 0}, "greater than 0"),
        ({**SHAPE, "hiden_size": 3}, "hiden_size"),
        ({"preset": "tiny", "heads": 5}, r"model\.heads 5 must be a multiple of model\.kv_heads 2"),
    ],
)
def test_impossible_models_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(given)


@pytest.mark.parametrize(
    ("changed", "tensor", "message"),
    [
        ({}, 3, r"model\.heads 4 is not a multiple of parallel\.tensor 3"),
        ({}, 4, r"model\.kv_heads 2 is not a multiple of parallel\.tensor 4"),
        ({"feed_forward_size": 49}, 2, r"model\.feed_forward_size 49 is not a multiple of parallel\.tensor 2"),
        ({"vocabulary_size": 101}, 2, r"model\.vocabulary_size 101 is not a multiple of parallel\.tensor 2"),
    ],
)
def test_tensor_degrees_that_do_not_divide_are_refused(changed: dict[str, int], tensor: int, message: str) -> None:
    config = ModelConfig.model_validate({**SHAPE, **changed})
    config.check_tensor_degree(1)
    with pytest.raises(ValueError, match=message):
        config.check_tensor_degree(tensor)


def test_an_unknown_vocabulary_divides_by_anything_yet() -> None:
    ModelConfig.model_validate(SHAPE).check_tensor_degree(2)
