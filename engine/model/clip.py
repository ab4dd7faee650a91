"""CLIP's published weights and tokenizer, through transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine import config
from engine.errors import UserError
from engine.model.text import SHAPES, TextTransformer, Tokenizer, hashed_words
from engine.model.vit import VisionTransformer, interpolate

HUB = "openai/clip-vit-base-patch16"
NAMES = {
    "embeddings.": "",
    "encoder.": "",
    "pre_layrnorm": "pre_norm",  # so it is published
    "post_layernorm": "post_norm",
    "final_layer_norm": "final_norm",
    "position_embedding.weight": "position_embedding",
}
"""Parts of published parameter names, and what they are here."""


def load(vision: VisionTransformer, text: TextTransformer, settings: config.Model) -> None:
    """Initialise both encoders; the position embeddings of the images are interpolated to their shape.

    Args:
        settings: `weights` is "clip" for the hub's ViT-B/16, or a folder in its layout.

    Raises:
        UserError: transformers is not installed, nothing is found, or it is another network.
    """
    state = _pretrained("CLIPModel", settings).state_dict()
    for part, network in (("vision_model.", vision), ("text_model.", text)):
        given = {_rename(name.removeprefix(part)): value for name, value in state.items() if name.startswith(part)}
        if part == "vision_model.":
            given["position_embedding"] = interpolate(given["position_embedding"], vision.grid)
        _copy(network.state_dict(), given, settings)


def tokenizer(settings: config.Model, prefix: int) -> Tokenizer:
    """CLIP's tokenizer beside its weights, hashed words where there are none; both leave room for the prefix."""
    shape = SHAPES[settings.backbone]
    longest = shape.positions - prefix
    if settings.weights == "none":
        return hashed_words(shape.vocabulary, longest)
    tokenize = _pretrained("CLIPTokenizer", settings)
    return lambda texts: tokenize(list(texts), truncation=True, max_length=longest)["input_ids"]


def _pretrained(kind: str, settings: config.Model) -> Any:
    source = HUB if settings.weights == "clip" else settings.weights
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            'model.weights: CLIP needs transformers, which is not installed; run: pip install "vireid-engine[firm]" '
            "(or train from random weights: model.weights=none)"
        ) from error
    try:
        return getattr(transformers, kind).from_pretrained(source, local_files_only=not settings.download)
    except Exception as error:  # missing, damaged and foreign folders fail in many ways; all have one remedy
        raise UserError(
            f"model.weights: no CLIP model at {source} ({str(error).splitlines()[0]}). Put the files of "
            f"https://huggingface.co/{HUB} (config.json, model.safetensors, vocab.json, merges.txt, tokenizer_config.json) "
            "into a folder and give it by --set model.weights=FOLDER, or allow the download by --set model.download=true "
            "--set model.weights=clip (or train from random weights: model.weights=none)"
        ) from error


def _rename(name: str) -> str:
    for published, here in NAMES.items():
        name = name.replace(published, here)
    return name


def _copy(own: dict[str, Tensor], given: dict[str, Tensor], settings: config.Model) -> None:
    wrong = [
        name
        for name, value in own.items()
        if name != "prefix" and getattr(given.get(name), "shape", None) != value.shape
    ]
    if wrong:
        raise UserError(
            f"model.weights: {settings.weights} is not CLIP's {settings.backbone}: {len(wrong)} tensors are missing or have "
            f"another shape, first '{wrong[0]}'; use {HUB}"
        )
    with torch.no_grad():
        for name, value in own.items():
            if name != "prefix":
                value.copy_(given[name])
