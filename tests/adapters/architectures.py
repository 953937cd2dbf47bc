"""Models as people build them, tiny and with random weights: what `wrap` must leave as it is."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

# The models below are made from configurations; nothing is looked up anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

VOCAB, TIME = 32, 6
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"initializer_range": 0.2}
"""Of random weights; the usual 0.02 is for networks a hundred times as wide."""


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


def ids(*shape: int, low: int = 4) -> Tensor:
    """Token ids; the first few are special in most vocabularies."""
    return torch.randint(low, VOCAB, shape)


def padded(batch: int, time: int) -> Tensor:
    """An attention mask whose last row ends early."""
    mask = torch.ones(batch, time, dtype=torch.long)
    mask[-1, time // 2 :] = 0
    return mask


# ---------------------------------------------------------------- from transformers


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


# ---------------------------------------------------------------- of plain torch


class Translator(nn.Module):
    """`nn.Transformer`, with masks, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8, padding_idx=0)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        h = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal.isinf(),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(h)


class SentenceEncoder(nn.Module):
    """`nn.TransformerEncoder` on sequences of several lengths, whose means are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        h = h.masked_fill(padding[..., None], 0.0)
        return self.head(h.sum(1) / (~padding).sum(1, keepdim=True))


class Recurrent(nn.Module):
    """A recurrent network with a linear head; returns its state too."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        h, state = self.rnn(self.embed(tokens))
        return self.head(h[:, -1]), state


class TiedLanguageModel(nn.Module):
    """A causal convolution whose head is its embedding, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.mix = nn.Conv1d(8, 8, 2)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(nn.functional.pad(self.embed(tokens).mT, (1, 0))).mT
        h = h + self.block(h)
        h = h + self.block(h)
        return self.head(h)


class NormedConvs(nn.Module):
    """Convolutions with normed weights, one of them transposed, as vocoders and critics have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(2, 6, 3, padding=1))
        self.up = weight_norm(nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1))
        self.critic = spectral_norm(nn.Conv1d(4, 4, 3, padding=2, dilation=2))
        self.score = spectral_norm(nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.up(nn.functional.leaky_relu(self.first(x), 0.1)), 0.1)
        return self.score(self.critic(h).mean(-1))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Recommender(nn.Module):
    """Bags of items and a vector of numbers, scored."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(VOCAB, 6, mode="mean")
        self.bottom = nn.Linear(3, 6)
        self.cross = nn.Bilinear(6, 6, 4)
        self.top = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, bags: Tensor, numbers: Tensor) -> Tensor:
        items, vector = self.items(bags), self.bottom(numbers)
        return self.top(self.cross(items, vector)).sigmoid()


class MessagePassing(nn.Module):
    """h_i ← tanh(U h_i + Σ_j V h_j over the edges (j, i))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.message = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(h)[edges[0]]
        return torch.tanh(self.own(h).index_add(0, edges[1], sent))


class GraphNet(nn.Module):
    """Two rounds of messages, and the mean of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.rounds = nn.ModuleList(MessagePassing(8) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, *, graphs: int) -> Tensor:
        h = self.embed(nodes)
        for layer in self.rounds:
            h = self.norm(layer(h, edges=edges))
        sums = torch.zeros(graphs, h.shape[1]).index_add(0, graph, h)
        return self.head(sums / torch.bincount(graph, minlength=graphs)[:, None])


def video_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.SiLU(),
        nn.Dropout3d(0.1),
        nn.Conv3d(4, 4, 1),
        nn.BatchNorm3d(4),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


class TimedBlock(nn.Module):
    """A residual block of a diffusion model, shifted by an embedding of the time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_2, self.conv_2 = (
            nn.GroupNorm(2, outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.time = nn.Linear(8, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_1(nn.functional.silu(self.norm_1(x)))
        h = h + self.time(t)[..., None, None]
        return self.skip(x) + self.conv_2(nn.functional.silu(self.norm_2(h)))


class DiffusionUNet(nn.Module):
    """Predicts the noise in images, at two resolutions with attention at the lower."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.entry = nn.Conv2d(1, 4, 3, padding=1)
        self.down, self.pool = TimedBlock(4, 4), nn.Conv2d(4, 8, 2, stride=2)
        self.middle = TimedBlock(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.grow = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.up, self.exit = TimedBlock(8, 4), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep[:, None] / 2.0 ** torch.arange(4)
        t = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        high = self.down(self.entry(x), t)
        low = self.middle(self.pool(high), t)
        flat = low.flatten(2).mT
        low = low + self.attention(flat, flat, flat, need_weights=False)[0].mT.view_as(low)
        return self.exit(self.up(torch.cat([self.grow(low), high], 1), t))


@dataclasses.dataclass
class Prediction:
    """What `Tabular` returns."""

    mean: Tensor
    spread: Tensor
    parts: dict[str, Tensor]
    scale: float


class KeywordBlock(nn.Module):
    """Takes its input by keyword alone, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.inner(x)
        return torch.relu(h) * scale, h


class Tabular(nn.Module):
    """Takes a dictionary and a flag, by keyword alone; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleDict({"age": nn.Linear(1, 6), "place": nn.Linear(2, 6)})
        self.block = KeywordBlock()
        self.mean, self.spread = nn.Linear(6, 1), nn.Linear(in_features=6, out_features=1)

    def forward(self, *, batch: dict[str, Tensor], scale: float = 1.0) -> Prediction:
        parts = {name: layer(input=batch[name]) for name, layer in self.columns.items()}
        h, raw = self.block(x=torch.stack(list(parts.values())).sum(0), scale=scale)
        parts["raw"] = raw
        return Prediction(self.mean(h), self.spread(h).exp(), parts, scale)


def translator_options() -> dict[str, Any]:
    source = ids(2, TIME)
    source[1, 4:] = 0
    return {"source": source, "target": ids(2, 4)}


def sentence_options() -> dict[str, Any]:
    return {"tokens": ids(3, TIME), "padding": padded(3, TIME) == 0}


def graph_options() -> dict[str, Any]:
    return {
        "nodes": torch.randn(7, 3),
        "edges": torch.randint(0, 7, (2, 12)),
        "graph": torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        "graphs": 3,
    }


def tabular_options() -> dict[str, Any]:
    return {"batch": {"age": torch.randn(4, 1), "place": torch.randn(4, 2)}, "scale": 2.0}


def tokens_options() -> dict[str, Any]:
    return {"tokens": ids(3, TIME)}


def inputs(name: str, *shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(*shape)}


LINEAR = {"linear": (nn.Linear,)}

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture(
        bert,
        text(labels=3),
        {
            **LINEAR,
            "norms and embeddings": (nn.LayerNorm, nn.Embedding),
            "blocks": "bert.encoder.layer.?",
            "attention": "*.attention.self",
        },
        own_loss,
    ),
    "BERT's base": Architecture(
        bert_base, base_options(text()), {**LINEAR, "blocks": "encoder.layer.?"}, mean_square
    ),
    "GPT-2": Architecture(
        gpt2,
        text(labels="next"),
        {
            "Conv1D": (Conv1D,),
            "blocks": "transformer.h.?",
            "embedding and head": ("transformer.wte", "lm_head"),
            "attention": "*.attn",
        },
        own_loss,
        continued,
    ),
    "Llama": Architecture(
        llama,
        text(labels="next", output_hidden_states=True),
        {
            **LINEAR,
            "norms": (LlamaRMSNorm,),
            "attention and MLP": ("*.self_attn", "*.mlp"),
            "blocks": "model.layers.?",
        },
        own_loss,
        continued,
    ),
    "Llama, checkpointed": Architecture(
        checkpointed_llama,
        text(labels="next", use_cache=False),
        {**LINEAR, "blocks": "model.layers.?"},
        own_loss,
    ),
    "Mixtral": Architecture(
        mixtral,
        text(labels="next"),
        {**LINEAR, "experts": ("*.mlp", "*.mlp.experts")},
        own_loss,
        continued,
    ),
    "Mamba": Architecture(
        mamba,
        text(labels="next", use_cache=False),
        {"projections": ("*.in_proj", "*.out_proj"), "mixers": "*.mixer"},
        own_loss,
    ),
    "T5": Architecture(
        t5,
        t5_options,
        {**LINEAR, "blocks": ("encoder.block.?", "decoder.block.?"), "norms": "*layer_norm"},
        own_loss,
        continued,
    ),
    "Whisper": Architecture(
        whisper,
        whisper_options,
        {**LINEAR, "convolutions": (nn.Conv1d,), "attention": ("*_attn",)},
        own_loss,
        transcribed,
    ),
    "ViT": Architecture(
        vit,
        images(8),
        {**LINEAR, "patches and norms": (nn.Conv2d, nn.LayerNorm)},
        own_loss,
    ),
    "ViT's base": Architecture(vit_base, base_options(images(8)), LINEAR, mean_square),
    "ResNet": Architecture(
        resnet,
        images(32),
        {
            "convolutions": (nn.Conv2d,),
            "batch norms": (nn.BatchNorm2d,),
            "stages": "resnet.encoder.stages.?",
        },
        own_loss,
    ),
    "ConvNeXt": Architecture(
        convnext,
        images(16),
        {"convolutions": (nn.Conv2d,), **LINEAR, "stages": "convnext.encoder.stages.?"},
        own_loss,
    ),
    "Swin": Architecture(
        swin, images(16), {**LINEAR, "blocks": "*.blocks.?", "patches": (nn.Conv2d,)}, own_loss
    ),
    "MobileNetV2": Architecture(mobilenet, images(32), {"convolutions": (nn.Conv2d,)}, own_loss),
    "EfficientNet": Architecture(
        efficientnet, images(16), {"convolutions": (nn.Conv2d,), "blocks": "*.blocks.?"}, own_loss
    ),
    "CLIP": Architecture(clip, clip_options, {**LINEAR, "blocks": "*.encoder.layers.?"}, own_loss),
    "wav2vec 2.0": Architecture(
        wav2vec2,
        wav2vec2_options,
        {**LINEAR, "convolutions": (nn.Conv1d,), "norms": (nn.LayerNorm, nn.GroupNorm)},
        own_loss,
    ),
    "a diffusion UNet": Architecture(
        DiffusionUNet,
        lambda: {"x": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1.0, 7.0])},
        {
            "convolutions": (nn.Conv2d, nn.ConvTranspose2d),
            "norms": (nn.GroupNorm,),
            "attention": (nn.MultiheadAttention,),
            "blocks": (TimedBlock,),
            "the model itself": "",
        },
        mean_square,
    ),
    "nn.Transformer": Architecture(
        Translator,
        translator_options,
        {**LINEAR, "attention": (nn.MultiheadAttention,), "layers": "transformer.*coder.layers.?"},
        mean_square,
    ),
    "nn.TransformerEncoder": Architecture(
        SentenceEncoder,
        sentence_options,
        {
            **LINEAR,
            "attention": (nn.MultiheadAttention,),
            "layers": (nn.TransformerEncoderLayer,),
            "whole": (nn.TransformerEncoder,),
        },
        mean_square,
    ),
    "LSTM": Architecture(
        lambda: Recurrent(nn.LSTM),
        tokens_options,
        {"LSTM": (nn.LSTM,), "head": (nn.Linear,)},
        mean_square,
    ),
    "LSTM, bidirectional": Architecture(
        lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2, dropout=0.1, proj_size=0),
        tokens_options,
        {"both": (nn.LSTM, nn.Linear)},
        mean_square,
    ),
    "GRU": Architecture(
        lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.2),
        tokens_options,
        {"GRU": (nn.GRU,), "embedding": (nn.Embedding,)},
        mean_square,
    ),
    "tied language model": Architecture(
        TiedLanguageModel,
        tokens_options,
        {"tied": (nn.Embedding, "head"), "block called twice": "block", "mix": (nn.Conv1d,)},
        mean_square,
    ),
    "normed weights": Architecture(
        NormedConvs,
        inputs("x", 2, 2, 8),
        {
            "convolutions": (nn.Conv1d, nn.ConvTranspose1d),
            **LINEAR,
        },
        mean_square,
    ),
    "convolutions and BatchNorm": Architecture(
        conv_net,
        inputs("input", 4, 3, 8, 8),
        {
            "convolutions": (nn.Conv2d,),
            "batch norms": (nn.BatchNorm2d,),
            **LINEAR,
            "the model itself": "",
        },
        mean_square,
    ),
    "EmbeddingBag": Architecture(
        Recommender,
        lambda: {"bags": ids(4, 3), "numbers": torch.randn(4, 3)},
        {"bags": (nn.EmbeddingBag,), **LINEAR, "bilinear": (nn.Bilinear,)},
        mean_square,
    ),
    "messages on graphs": Architecture(
        GraphNet, graph_options, {**LINEAR, "rounds": (MessagePassing,)}, mean_square
    ),
    "convolutions in 3 dimensions": Architecture(
        video_net,
        inputs("input", 2, 2, 4, 6, 6),
        {"convolutions": (nn.Conv3d,), "norms": (nn.InstanceNorm3d, nn.BatchNorm3d)},
        mean_square,
    ),
    "dictionaries and dataclasses": Architecture(
        Tabular, tabular_options, {**LINEAR, "blocks": (KeywordBlock,)}, mean_square
    ),
}
