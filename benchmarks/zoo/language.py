"""Models of transformers, built small from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORDS, TOKENS, WIDTH, HEADS, LAYERS, SIDE = 512, 12, 64, 4, 2, 32

Make = tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]


def _tokens() -> Tensor:
    return torch.randint(3, WORDS, (2, TOKENS), generator=torch.Generator().manual_seed(2))


def _image(side: int = SIDE) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def _model(name: str, head: str, **more: Any) -> Callable[[], nn.Module]:
    """A model whose configuration has BERT's names, and in `more` those of its own."""

    def make() -> nn.Module:
        import transformers  # noqa: PLC0415

        common = {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
        }
        config = getattr(transformers, f"{name}Config")(**{**common, **more})
        model: nn.Module = getattr(transformers, f"{name}{head}")(config)
        return model

    return make


def _decoder(name: str, **more: Any) -> Make:
    """A causal language model whose configuration has Llama's names."""
    grouped = {"num_key_value_heads": HEADS // 2, "head_dim": WIDTH // HEADS}
    return _model(name, "ForCausalLM", **grouped, **more), lambda: {**_text(), "use_cache": False}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration  # noqa: PLC0415

    config = T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS
    )
    return T5ForConditionalGeneration(config)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel  # noqa: PLC0415

    common = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    common |= {"num_attention_heads": HEADS, "projection_dim": WIDTH}
    config = CLIPConfig(
        text_config={**common, "vocab_size": WORDS, "max_position_embeddings": 32, "eos_token_id": WORDS - 1},
        vision_config={**common, "image_size": SIDE, "patch_size": 8},
        projection_dim=WIDTH,
    )
    return CLIPModel(config)


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration  # noqa: PLC0415

    config = WhisperConfig(
        vocab_size=WORDS, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH, max_source_positions=32, max_target_positions=32, num_mel_bins=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


MODELS: dict[str, Make] = {
    "llama": _decoder("Llama"),
    "qwen3": _decoder("Qwen3"),
    "mistral": _decoder("Mistral"),
    "gemma": _decoder("Gemma"),
    "mixtral": _decoder("Mixtral", num_local_experts=4),
    "gpt2": (_gpt2, lambda: {**_text(), "use_cache": False}),
    "bert": (_model("Bert", "ForMaskedLM"), _text),
    "roberta": (_model("Roberta", "ForMaskedLM"), _text),
    "vit": (
        _model("ViT", "ForImageClassification", image_size=SIDE, patch_size=8),
        lambda: {"pixel_values": _image()},
    ),
    "clip": (_clip, lambda: {"input_ids": _tokens(), "pixel_values": _image()}),
    "t5": (_t5, lambda: {**_text(), "decoder_input_ids": _tokens(), "use_cache": False}),
    "whisper": (
        _whisper,
        lambda: {
            "input_features": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(4)),
            "decoder_input_ids": _tokens(),
            "use_cache": False,
        },
    ),
}
"""How each is made, and the keyword arguments of its forward."""
