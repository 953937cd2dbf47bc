"""Hosts of transformers, made from configurations: tiny, with random weights."""

import os
from collections.abc import Callable
from typing import Any

# Nothing is looked up anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch import Tensor, nn

from tests.adapters.hosts_torch import TIME, VOCAB, ids, padded

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"initializer_range": 0.2}
"""Of random weights; the usual 0.02 is for networks a hundred times as wide."""


def bert_config(**options: Any) -> Any:
    return hf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        **WIDE,
        **options,
    )


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(bert_config())


def bert_base() -> nn.Module:
    return hf.BertModel(bert_config(attn_implementation="eager"))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, **TOKENS, **WIDE
    )
    return hf.GPT2LMHeadModel(config)


def llama_config(kind: type = hf.LlamaConfig, **options: Any) -> Any:
    return kind(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **TOKENS,
        **WIDE,
        **options,
    )


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(llama_config())


def checkpointed_llama() -> nn.Module:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def mixtral() -> nn.Module:
    config = llama_config(
        hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return hf.MixtralForCausalLM(config)


def mamba() -> nn.Module:
    config = hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, **TOKENS, **WIDE
    )
    return hf.MambaForCausalLM(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=16,
        decoder_start_token_id=3,
        dropout=0.1,
        init_std=0.2,
        **TOKENS,
    )
    return hf.WhisperForConditionalGeneration(config)


def vision(kind: Any, **options: Any) -> Any:
    return kind(num_labels=3, **options)


def vit_config(**options: Any) -> Any:
    return vision(
        hf.ViTConfig,
        **WIDE,
        **options,
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.1,
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(vit_config())


def vit_base() -> nn.Module:
    return hf.ViTModel(vit_config(attn_implementation="eager"))


def resnet() -> nn.Module:
    config = vision(
        hf.ResNetConfig, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    return hf.ResNetForImageClassification(config)


def convnext() -> nn.Module:
    config = vision(
        hf.ConvNextConfig,
        **WIDE,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        drop_path_rate=0.2,
        layer_scale_init_value=0.1,
    )
    return hf.ConvNextForImageClassification(config)


def swin() -> nn.Module:
    config = vision(
        hf.SwinConfig,
        **WIDE,
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=2,
        drop_path_rate=0.2,
    )
    return hf.SwinForImageClassification(config)


def mobilenet() -> nn.Module:
    config = vision(
        hf.MobileNetV2Config,
        image_size=32,
        depth_multiplier=0.1,
        depth_divisible_by=4,
        min_depth=4,
        finegrained_output=False,
    )
    return hf.MobileNetV2ForImageClassification(config)


def efficientnet() -> nn.Module:
    config = vision(
        hf.EfficientNetConfig,
        **WIDE,
        image_size=16,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        in_channels=[32, 32],
        out_channels=[32, 48],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 4],
        depthwise_padding=[],
        hidden_dim=320,
        depth_divisor=4,
    )
    return hf.EfficientNetForImageClassification(config)


def clip() -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 12,
    }
    text = {"vocab_size": VOCAB, "max_position_embeddings": 16, **sizes, **TOKENS}
    image = {"image_size": 8, "patch_size": 4, **sizes}
    config = hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=12)
    return hf.CLIPModel(config)


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(4, 2),
        conv_kernel=(8, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        # Its masks are drawn by numpy, which these tests do not seed.
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        **TOKENS,
        **WIDE,
    )
    return hf.Wav2Vec2ForCTC(config)


def text(**options: Any) -> Callable[[], dict[str, Any]]:
    """Padded token ids with an attention mask; `labels` is how many, or "next" for the tokens."""

    def make() -> dict[str, Any]:
        tokens = ids(3, TIME)
        made = {"input_ids": tokens, "attention_mask": padded(3, TIME), **options}
        if made.get("labels") == "next":
            made["labels"] = tokens.masked_fill(made["attention_mask"] == 0, -100)
        elif "labels" in made:
            made["labels"] = torch.arange(3) % made["labels"]
        return made

    return make


def images(size: int, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "pixel_values": torch.randn(3, 3, size, size),
        "labels": torch.arange(3),
        **options,
    }


def t5_options() -> dict[str, Any]:
    return {"input_ids": ids(2, TIME), "labels": ids(2, 4), "attention_mask": padded(2, TIME)}


def whisper_options() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 20), "labels": ids(2, 4)}


def clip_options() -> dict[str, Any]:
    return {"input_ids": ids(3, TIME), "pixel_values": torch.randn(3, 3, 8, 8), "return_loss": True}


def wav2vec2_options() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 200), "labels": ids(2, 3)}


def base_options(options: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Without labels, and with all hidden states and attention weights asked for."""

    def make() -> dict[str, Any]:
        asked = {"output_hidden_states": True, "output_attentions": True}
        return {k: v for k, v in options().items() if k != "labels"} | asked

    return make


def continued(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(input_ids=ids(2, 4), max_new_tokens=5, do_sample=False, **options)


def transcribed(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    features = torch.randn(2, 8, 20)
    return model.generate(input_features=features, max_new_tokens=5, do_sample=False, **options)
