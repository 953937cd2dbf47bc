"""Models as people build them: what `wrap` must leave as it is, and what can be grafted onto."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# First of all: it says that transformers is to stay off the network.
from tests.adapters import hosts_torch, hosts_transformers  # isort: skip
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D


def every_layer(path: str, module: nn.Module) -> bool:
    """A target: all that can be called; activations, blocks and the model itself included."""
    return type(module).forward is not nn.Module.forward


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model, a call of it, and layers of it to wrap."""

    build: Callable[[], nn.Module]
    options: Callable[[], Mapping[str, Any]]
    """The arguments of one call, by name."""
    targets: Mapping[str, Any]
    """Values of `target_layers`, by what they are called."""
    loss: Callable[[Any], Tensor]
    generate: Callable[..., Tensor] | None = None
    """`generate(model, **options)`: tokens, greedily."""


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in what a model returned, caches and dataclasses included."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return tensors(list(output.values()))
    if isinstance(output, list | tuple):
        return [t for part in output for t in tensors(part)]
    return tensors(vars(output)) if hasattr(output, "__dict__") else []


def own_loss(output: Any) -> Tensor:
    """The loss that a model computes of its labels."""
    return output.loss


def mean_square(output: Any) -> Tensor:
    """The mean square of all that a model returned."""
    return torch.stack([t.square().mean() for t in tensors(output) if t.requires_grad]).sum()


LINEAR = {"linear": (nn.Linear,)}

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture(
        hosts_transformers.bert,
        hosts_transformers.text(labels=3),
        {
            **LINEAR,
            "norms and embeddings": (nn.LayerNorm, nn.Embedding),
            "blocks": "bert.encoder.layer.?",
            "attention": "*.attention.self",
        },
        own_loss,
    ),
    "BERT's base": Architecture(
        hosts_transformers.bert_base,
        hosts_transformers.base_options(hosts_transformers.text()),
        {**LINEAR, "blocks": "encoder.layer.?"},
        mean_square,
    ),
    "GPT-2": Architecture(
        hosts_transformers.gpt2,
        hosts_transformers.text(labels="next"),
        {
            "Conv1D": (Conv1D,),
            "blocks": "transformer.h.?",
            "embedding and head": ("transformer.wte", "lm_head"),
            "attention": "*.attn",
        },
        own_loss,
        hosts_transformers.continued,
    ),
    "Llama": Architecture(
        hosts_transformers.llama,
        hosts_transformers.text(labels="next", output_hidden_states=True),
        {
            **LINEAR,
            "norms": (LlamaRMSNorm,),
            "attention and MLP": ("*.self_attn", "*.mlp"),
            "blocks": "model.layers.?",
        },
        own_loss,
        hosts_transformers.continued,
    ),
    "Llama, checkpointed": Architecture(
        hosts_transformers.checkpointed_llama,
        hosts_transformers.text(labels="next", use_cache=False),
        {**LINEAR, "blocks": "model.layers.?"},
        own_loss,
    ),
    "Mixtral": Architecture(
        hosts_transformers.mixtral,
        hosts_transformers.text(labels="next"),
        {**LINEAR, "experts": ("*.mlp", "*.mlp.experts")},
        own_loss,
        hosts_transformers.continued,
    ),
    "Mamba": Architecture(
        hosts_transformers.mamba,
        hosts_transformers.text(labels="next", use_cache=False),
        {"projections": ("*.in_proj", "*.out_proj"), "mixers": "*.mixer"},
        own_loss,
    ),
    "T5": Architecture(
        hosts_transformers.t5,
        hosts_transformers.t5_options,
        {**LINEAR, "blocks": ("encoder.block.?", "decoder.block.?"), "norms": "*layer_norm"},
        own_loss,
        hosts_transformers.continued,
    ),
    "Whisper": Architecture(
        hosts_transformers.whisper,
        hosts_transformers.whisper_options,
        {**LINEAR, "convolutions": (nn.Conv1d,), "attention": ("*_attn",)},
        own_loss,
        hosts_transformers.transcribed,
    ),
    "ViT": Architecture(
        hosts_transformers.vit,
        hosts_transformers.images(8),
        {**LINEAR, "patches and norms": (nn.Conv2d, nn.LayerNorm)},
        own_loss,
    ),
    "ViT's base": Architecture(
        hosts_transformers.vit_base,
        hosts_transformers.base_options(hosts_transformers.images(8)),
        LINEAR,
        mean_square,
    ),
    "ResNet": Architecture(
        hosts_transformers.resnet,
        hosts_transformers.images(32),
        {
            "convolutions": (nn.Conv2d,),
            "batch norms": (nn.BatchNorm2d,),
            "stages": "resnet.encoder.stages.?",
        },
        own_loss,
    ),
    "ConvNeXt": Architecture(
        hosts_transformers.convnext,
        hosts_transformers.images(16),
        {"convolutions": (nn.Conv2d,), **LINEAR, "stages": "convnext.encoder.stages.?"},
        own_loss,
    ),
    "Swin": Architecture(
        hosts_transformers.swin,
        hosts_transformers.images(16),
        {**LINEAR, "blocks": "*.blocks.?", "patches": (nn.Conv2d,)},
        own_loss,
    ),
    "MobileNetV2": Architecture(
        hosts_transformers.mobilenet,
        hosts_transformers.images(32),
        {"convolutions": (nn.Conv2d,)},
        own_loss,
    ),
    "EfficientNet": Architecture(
        hosts_transformers.efficientnet,
        hosts_transformers.images(16),
        {"convolutions": (nn.Conv2d,), "blocks": "*.blocks.?"},
        own_loss,
    ),
    "CLIP": Architecture(
        hosts_transformers.clip,
        hosts_transformers.clip_options,
        {**LINEAR, "blocks": "*.encoder.layers.?"},
        own_loss,
    ),
    "wav2vec 2.0": Architecture(
        hosts_transformers.wav2vec2,
        hosts_transformers.wav2vec2_options,
        {**LINEAR, "convolutions": (nn.Conv1d,), "norms": (nn.LayerNorm, nn.GroupNorm)},
        own_loss,
    ),
    "a diffusion UNet": Architecture(
        hosts_torch.DiffusionUNet,
        lambda: {"x": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1.0, 7.0])},
        {
            "convolutions": (nn.Conv2d, nn.ConvTranspose2d),
            "norms": (nn.GroupNorm,),
            "attention": (nn.MultiheadAttention,),
            "blocks": (hosts_torch.TimedBlock,),
            "the model itself": "",
        },
        mean_square,
    ),
    "nn.Transformer": Architecture(
        hosts_torch.Translator,
        hosts_torch.translator_options,
        {**LINEAR, "attention": (nn.MultiheadAttention,), "layers": "transformer.*coder.layers.?"},
        mean_square,
    ),
    "nn.TransformerEncoder": Architecture(
        hosts_torch.SentenceEncoder,
        hosts_torch.sentence_options,
        {
            **LINEAR,
            "attention": (nn.MultiheadAttention,),
            "layers": (nn.TransformerEncoderLayer,),
            "whole": (nn.TransformerEncoder,),
        },
        mean_square,
    ),
    "LSTM": Architecture(
        lambda: hosts_torch.Recurrent(nn.LSTM),
        hosts_torch.tokens_options,
        {"LSTM": (nn.LSTM,), "head": (nn.Linear,)},
        mean_square,
    ),
    "LSTM, bidirectional": Architecture(
        lambda: hosts_torch.Recurrent(
            nn.LSTM, bidirectional=True, num_layers=2, dropout=0.1, proj_size=0
        ),
        hosts_torch.tokens_options,
        {"both": (nn.LSTM, nn.Linear)},
        mean_square,
    ),
    "GRU": Architecture(
        lambda: hosts_torch.Recurrent(nn.GRU, num_layers=2, dropout=0.2),
        hosts_torch.tokens_options,
        {"GRU": (nn.GRU,), "embedding": (nn.Embedding,)},
        mean_square,
    ),
    "tied language model": Architecture(
        hosts_torch.TiedLanguageModel,
        hosts_torch.tokens_options,
        {"tied": (nn.Embedding, "head"), "block called twice": "block", "mix": (nn.Conv1d,)},
        mean_square,
    ),
    "normed weights": Architecture(
        hosts_torch.NormedConvs,
        hosts_torch.inputs("x", 2, 2, 8),
        {
            "convolutions": (nn.Conv1d, nn.ConvTranspose1d),
            **LINEAR,
        },
        mean_square,
    ),
    "spectral norms by hooks": Architecture(
        hosts_torch.Critic,
        hosts_torch.inputs("x", 3, 2, 6, 6),
        {"convolutions": (nn.Conv2d,), **LINEAR},
        mean_square,
    ),
    "convolutions and BatchNorm": Architecture(
        hosts_torch.conv_net,
        hosts_torch.inputs("input", 4, 3, 8, 8),
        {
            "convolutions": (nn.Conv2d,),
            "batch norms": (nn.BatchNorm2d,),
            **LINEAR,
            "the model itself": "",
        },
        mean_square,
    ),
    "EmbeddingBag": Architecture(
        hosts_torch.Recommender,
        lambda: {"bags": hosts_torch.ids(4, 3), "numbers": torch.randn(4, 3)},
        {"bags": (nn.EmbeddingBag,), **LINEAR, "bilinear": (nn.Bilinear,)},
        mean_square,
    ),
    "messages on graphs": Architecture(
        hosts_torch.GraphNet,
        hosts_torch.graph_options,
        {**LINEAR, "rounds": (hosts_torch.MessagePassing,)},
        mean_square,
    ),
    "convolutions in 3 dimensions": Architecture(
        hosts_torch.video_net,
        hosts_torch.inputs("input", 2, 2, 4, 6, 6),
        {"convolutions": (nn.Conv3d,), "norms": (nn.InstanceNorm3d, nn.BatchNorm3d)},
        mean_square,
    ),
    "dictionaries and dataclasses": Architecture(
        hosts_torch.Tabular,
        hosts_torch.tabular_options,
        {**LINEAR, "blocks": (hosts_torch.KeywordBlock,)},
        mean_square,
    ),
}
