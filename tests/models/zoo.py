"""Models of other people in small configurations with random weights: how to make them, their inputs, their outputs.

torchvision, timm, transformers, diffusers and torch_geometric are imported only inside, when a model is made.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Model:
    """One model.

    Args:
        library: The package that it comes from.
        make: Returns the module, in float32.
        inputs: Returns what its forward takes, for so many samples.
        output_fn: Turns what it returns into (N, C); None if it is.
        coarse: It computes parts in float32 whatever its parameters are, so that in float64, too, kernels have the
            rounding of float32.
        kinked: Differences need not converge where kinks lie close.
    """

    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    output_fn: Callable | None = None
    coarse: bool = False
    kinked: bool = False


def images(size=16, channels=3):
    return lambda count: torch.randn(count, channels, size, size)


def tokens(length=6, **more):
    def inputs(count):
        mask = torch.ones(count, length, dtype=torch.long)
        return {"input_ids": torch.randint(3, 20, (count, length)), "attention_mask": mask, **more}

    return inputs


def torchvision_schema():
    """Let torchvision's wheel, which is built for CUDA, be imported beside a torch without.

    Its C++ operators cannot be loaded there, and it stops at the first whose schema is missing. No model here uses any.
    """
    if find_spec("torchvision") is None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def vision(name, *arguments, **options):
    def make():
        torchvision_schema()
        from torchvision import models

        return getattr(models, name)(*arguments, **options)

    return make


def convnext():
    torchvision_schema()
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.1, 0.5, num_classes=2)


def efficientnet():
    torchvision_schema()
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    stages = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)]
    return EfficientNet(stages, dropout=0.2, num_classes=2, last_channel=16)


def swin():
    torchvision_schema()
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 8, [2, 1], [2, 2], [2, 2], num_classes=2)


def vit():
    torchvision_schema()
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(16, 8, 2, 2, 16, 24, dropout=0.1, num_classes=2)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # its own start is 0: a kernel of the head alone
    return model


def timm(name, **options):
    def make():
        torchvision_schema()
        import timm as library

        return library.create_model(name, pretrained=False, num_classes=2, **options)

    return make


def hugging_face(model, config, **options):
    def make():
        torchvision_schema()
        import transformers

        settings = getattr(transformers, config)(**options)
        settings._attn_implementation = "eager" if options.pop("eager", False) else settings._attn_implementation
        return getattr(transformers, model)(settings)

    return make


def diffuser(name, **options):
    def make():
        torchvision_schema()
        import diffusers

        return getattr(diffusers, name)(**options)

    return make


class Graphs(nn.Module):
    """Graphs of five nodes in one batch, as torch_geometric puts them together; a mean over nodes is read out."""

    EDGES = ((0, 1, 1, 2, 3, 4, 2), (1, 0, 2, 3, 4, 0, 0))

    def __init__(self, first, second, width):
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, 2)

    def forward(self, x):
        from torch_geometric.nn import global_mean_pool

        count, nodes, _ = x.shape
        offsets = nodes * torch.arange(count, device=x.device)
        edges = (torch.tensor(self.EDGES, device=x.device)[:, None] + offsets[:, None]).flatten(1)
        z = self.second(torch.tanh(self.first(x.flatten(0, 1), edges)), edges)
        return self.head(global_mean_pool(torch.tanh(z), torch.arange(count, device=x.device).repeat_interleave(nodes)))


def graphs(kind):
    def make():
        from torch_geometric import nn as layers

        if kind == "GIN":
            first, second = (
                layers.GINConv(nn.Sequential(nn.Linear(d, 6), nn.GELU(), nn.Linear(6, 6)), train_eps=True)
                for d in (3, 6)
            )
        elif kind == "GAT":
            first, second = layers.GATConv(3, 3, heads=2), layers.GATConv(6, 6)
        else:
            first, second = layers.GCNConv(3, 6), layers.GCNConv(6, 6)
        return Graphs(first, second, 6)

    return make


def nodes(count):
    return torch.randn(count, 5, 3)


LAST = {"output_fn": lambda out: out.logits[:, -1, :3]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 24}
MODELS = {
    "resnet18": Model("torchvision", vision("resnet18", num_classes=2), images(24), kinked=True),
    "mobilenet_v3": Model(
        "torchvision", vision("mobilenet_v3_small", num_classes=2, width_mult=0.3), images(32), kinked=True
    ),
    "densenet": Model("torchvision", vision("DenseNet", 4, (2, 2), 8, num_classes=2), images(32), kinked=True),
    "efficientnet": Model("torchvision", efficientnet, images()),
    "vit": Model("torchvision", vit, images()),
    "swin": Model("torchvision", swin, images()),
    "convnext": Model("torchvision", convnext, images()),
    "timm resnet": Model("timm", timm("test_resnet"), images(32), kinked=True),
    "timm vit": Model("timm", timm("test_vit", img_size=32), images(32)),
    "timm convnext": Model("timm", timm("test_convnext"), images(32)),
    "timm efficientnet": Model("timm", timm("test_efficientnet"), images(32)),
    "bert": Model(
        "transformers",
        hugging_face("BertForSequenceClassification", "BertConfig", **SMALL),
        tokens(),
        lambda out: out.logits,
    ),
    "distilbert": Model(
        "transformers",
        hugging_face(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            vocab_size=24,
        ),
        tokens(),
        lambda out: out.logits,
    ),
    "gpt2": Model(
        "transformers",
        hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=24, n_positions=16),
        tokens(use_cache=False),
        **LAST,
    ),
    "llama": Model(
        "transformers",
        hugging_face("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1),
        tokens(use_cache=False),
        **LAST,
        coarse=True,
    ),
    "qwen2": Model(
        "transformers",
        hugging_face("Qwen2ForCausalLM", "Qwen2Config", **SMALL, num_key_value_heads=1),
        tokens(),
        **LAST,
        coarse=True,
    ),
    "gemma": Model(
        "transformers",
        hugging_face("GemmaForCausalLM", "GemmaConfig", **SMALL, num_key_value_heads=1, head_dim=8),
        tokens(),
        **LAST,
        coarse=True,
    ),
    "mamba": Model(
        "transformers",
        hugging_face(
            "MambaForCausalLM", "MambaConfig", hidden_size=12, num_hidden_layers=2, state_size=4, vocab_size=24
        ),
        tokens(),
        **LAST,
        coarse=True,
    ),
    "t5": Model(
        "transformers",
        hugging_face(
            "T5EncoderModel", "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=24
        ),
        tokens(),
        lambda out: out.last_hidden_state.mean(1)[:, :3],
        coarse=True,
    ),
    "unet": Model(
        "diffusers",
        diffuser(
            "UNet2DModel",
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda count: {"sample": torch.randn(count, 1, 8, 8), "timestep": torch.arange(count) * 7},
        lambda out: out.sample[:, 0, 3, 2:5],
        coarse=True,
    ),
    "autoencoder": Model(
        "diffusers",
        diffuser(
            "AutoencoderKL",
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=2,
            sample_size=8,
        ),
        lambda count: torch.randn(count, 1, 8, 8),
        lambda out: out.sample[:, 0, 3, 2:5],
    ),
    "dit": Model(
        "diffusers",
        diffuser(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            num_layers=2,
            sample_size=4,
            num_embeds_ada_norm=10,
            norm_num_groups=2,
        ),
        lambda count: {
            "hidden_states": torch.randn(count, 2, 4, 4),
            "timestep": torch.arange(count) * 7,
            "class_labels": torch.arange(count) % 10,
        },
        lambda out: out.sample[:, 0, 1, 1:4],
        coarse=True,
    ),
    "GCN": Model("torch_geometric", graphs("GCN"), nodes),
    "GAT": Model("torch_geometric", graphs("GAT"), nodes),
    "GIN": Model("torch_geometric", graphs("GIN"), nodes),
}


def build(name: str, dtype: torch.dtype, count: int = 3):
    """The module, in training mode and with all of its outputs alive, and inputs for so many samples."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = MODELS[name].make().to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        with torch.no_grad():  # zero-initialized outputs would leave nothing to compare
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    torch.manual_seed(2)
    return module, MODELS[name].inputs(count)
