"""Reads a Whisper in CTranslate2's format and gives it back as the Hugging Face model it once was.

A `model.bin` is a list of named arrays: attention projections fused along their outputs, no bias for the keys
(CTranslate2 stores zeros), the output layer an alias of the embeddings.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

BINARY_VERSION = 6
SPECIFICATION = "WhisperSpec"
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file


class ConversionError(ValueError):
    """A file that is no Whisper of CTranslate2, or one of a kind that is not read here."""


class _Cursor:
    """Little-endian values one after the other; running over the end is an error that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.position = 0

    def take(self, size: int) -> bytes:
        part = self.data[self.position : self.position + size]
        if len(part) < size:
            raise ConversionError(f"{self.path} ends within a value: it is truncated, fetch it again")
        self.position += size
        return part

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        return self.take(self.number("H")).rstrip(b"\0").decode("utf-8", "replace")


def read_variables(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a `model.bin` by name, aliases included.

    Raises:
        ConversionError: another kind of file, another version of it, or a truncated one.
    """
    file = _Cursor(Path(path))
    version = file.number("I")
    if version != BINARY_VERSION:
        raise ConversionError(
            f"{path} begins with {version}: only CTranslate2's binary version {BINARY_VERSION} is read"
        )
    specification = file.string()
    if specification != SPECIFICATION:
        raise ConversionError(f"{path} holds a {specification!r}: only a Whisper ({SPECIFICATION}) is read")
    file.number("I")  # the revision says nothing about the layout
    variables = {}
    for _ in range(file.number("I")):
        name = file.string()
        variables[name] = _read_array(file, name)
    for _ in range(file.number("I")):
        alias = file.string()
        variables[alias] = variables[file.string()]
    return variables


def _read_array(file: _Cursor, name: str) -> np.ndarray:
    shape = [file.number("I") for _ in range(file.number("B"))]
    dtype = file.number("B")
    content = file.take(file.number("I"))
    if dtype >= len(DTYPES):
        raise ConversionError(f"{file.path} stores {name} as data type {dtype}: convert a float16 or float32 model")
    array = np.frombuffer(content, DTYPES[dtype])
    if array.size != np.prod(shape, dtype=int):
        raise ConversionError(f"{file.path} holds {array.size} values of {name} with the shape {shape}: fetch it again")
    return array.reshape(shape)


def whisper_config(variables: dict[str, np.ndarray]) -> WhisperConfig:
    """The sizes, read off the arrays; token ids keep the defaults of `WhisperConfig`."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=_count_layers(variables, "encoder"),
        decoder_layers=_count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        pad_token_id=None,  # the file does not say; the default is outside of a small vocabulary
    )


def _count_layers(variables: dict[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def convert_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Every key of `WhisperForConditionalGeneration`, in the dtype of the file.

    Raises:
        ConversionError: arrays are quantised to integers.
    """
    tensors = {}
    for name, array in variables.items():
        if array.ndim and array.dtype.kind != "f":
            raise ConversionError(f"{name} is stored as {array.dtype}: convert a float16 or float32 model")
        tensors[name] = torch.from_numpy(array.copy())
    state: dict[str, torch.Tensor] = {"proj_out.weight": tensors["decoder/projection/weight"]}
    state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        state |= _renamed(tensors, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(_count_layers(variables, side)):
            state |= _convert_layer(tensors, f"{side}/layer_{i}", f"model.{side}.layers.{i}")
    for name in ("conv1", "conv2"):
        state |= _renamed(tensors, f"encoder/{name}", f"model.encoder.{name}")
    return state


def _convert_layer(tensors: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    state = _convert_attention(tensors, f"{source}/self_attention", f"{target}.self_attn")
    if f"{source}/attention/linear_0/weight" in tensors:  # the decoder's, to the encoder's output
        state |= _convert_attention(tensors, f"{source}/attention", f"{target}.encoder_attn")
    state |= _renamed(tensors, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    state |= _renamed(tensors, f"{source}/ffn/linear_0", f"{target}.fc1")
    return state | _renamed(tensors, f"{source}/ffn/linear_1", f"{target}.fc2")


def _convert_attention(tensors: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """linear_0 is q, k and v, or q alone with k and v in linear_1; the last one is the output."""
    is_cross = f"{source}/linear_2/weight" in tensors
    fused = [f"{source}/linear_0", f"{source}/linear_1"] if is_cross else [f"{source}/linear_0"]
    weights = torch.cat([tensors[f"{name}/weight"] for name in fused]).chunk(3)
    biases = torch.cat([tensors[f"{name}/bias"] for name in fused]).chunk(3)
    state = {f"{target}.{kind}_proj.weight": w.clone() for kind, w in zip("qkv", weights, strict=True)}
    state |= {f"{target}.{kind}_proj.bias": b.clone() for kind, b in zip("qkv", biases, strict=True) if kind != "k"}
    state |= _renamed(tensors, f"{source}/linear_{len(fused)}", f"{target}.out_proj")
    return state | _renamed(tensors, f"{source}/layer_norm", f"{target}_layer_norm")


def _renamed(tensors: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """Weight and bias of one layer; layer norms call them gamma and beta."""
    weight, bias = ("gamma", "beta") if f"{source}/gamma" in tensors else ("weight", "bias")
    return {f"{target}.weight": tensors[f"{source}/{weight}"], f"{target}.bias": tensors[f"{source}/{bias}"]}


def load_ctranslate2_whisper(path: str | Path) -> WhisperForConditionalGeneration:
    """The model in a `model.bin`, fp32, every weight accounted for.

    Raises:
        ConversionError: the file cannot be read, or its arrays are no whole Whisper.
    """
    variables = read_variables(path)
    try:
        model = WhisperForConditionalGeneration(whisper_config(variables))
        model.load_state_dict(convert_state_dict(variables), strict=True)
    except (KeyError, RuntimeError) as error:
        raise ConversionError(f"{path} is no complete Whisper model: {error}") from error
    return model.eval()
