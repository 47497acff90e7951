"""The tokenizer of a checkpoint, with Hugging Face's `tokenizers`, and text that is shown while it grows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.sandbox
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKEN = 3  # in a GGUF file's tokenizer.ggml.token_type

# How the text is cut before byte-pair encoding, by the GGUF file's tokenizer.ggml.pre.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


class Text:
    """Tokens to text and back, the end of a text, and the chat template."""

    def __init__(
        self, tokenizer: Tokenizer, end: set[int], template: str | None, bos: int | None, names: dict[str, Any]
    ):
        self.tokenizer, self.end, self.template, self.bos, self.names = tokenizer, end, template, bos, names

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_chat(self, message: str) -> list[int]:
        """One message of a user, in the model's chat template, up to where the answer starts."""
        if self.template is None:
            raise ValueError("This model has no chat template: leave --chat out.")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        messages = [{"role": "user", "content": message}]
        text = environment.from_string(self.template).render(
            messages=messages, add_generation_prompt=True, **self.names
        )
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class Stream:
    """Gives the text of each new token to `show`, as soon as it is whole characters."""

    def __init__(self, text: Text, show: Callable[[str], None]):
        self.text, self.show = text, show
        self.ids: list[int] = []
        self.shown = ""

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        text = self.text.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.show(text[len(self.shown) :])
            self.shown = text


def load_text(metadata: dict[str, Any]) -> Text:
    """From the metadata of a checkpoint: those of a GGUF file, or `{"folder": ...}`."""
    return _from_folder(metadata["folder"]) if "folder" in metadata else _from_gguf(metadata)


def _from_gguf(metadata: dict[str, Any]) -> Text:

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    if get("model") != "gpt2" or get("pre") not in PRE_TOKENIZERS:
        raise NotImplementedError(
            f"Only byte-level BPE with {sorted(PRE_TOKENIZERS)}: model={get('model')!r}, pre={get('pre')!r}."
        )
    tokens = get("tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in get("merges"))]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[get("pre")]()
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, get("token_type")) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    named = lambda name: tokens[get(name)] if get(name) is not None else ""
    return Text(
        tokenizer,
        end={get("eos_token_id")},
        template=metadata.get("tokenizer.chat_template"),
        bos=get("bos_token_id") if get("add_bos_token", False) else None,
        names={"bos_token": named("bos_token_id"), "eos_token": named("eos_token_id")},
    )


def _from_folder(folder: Path) -> Text:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    read = lambda name: json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    config, settings = read("config.json"), read("tokenizer_config.json")
    end: Any = read("generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    content = lambda token: token["content"] if isinstance(token, dict) else token or ""
    return Text(
        tokenizer,  # tokenizer.json itself adds the first token, where the model wants one
        end=set(end) if isinstance(end, list) else {end},
        template=settings.get("chat_template"),
        bos=None,
        names={name: content(settings.get(name)) for name in ("bos_token", "eos_token")},
    )
