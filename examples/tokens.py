"""The tokenizer of a checkpoint, with Hugging Face's `tokenizers`, and streaming of generated text.

Unknown settings of a tokenizer are errors.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mqa_jax.torch_interop.hugging_face.weight_files import read_json

# Kinds of tokens in a GGUF file's tokenizer.ggml.token_type. Unused ones do not occur in texts.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# The splitting of text before byte-pair encoding, for each tokenizer.ggml.pre of GGUF files.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = "llama-bpe"
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    LLAMA3: lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


# Settings "tokenizer.ggml.*" of a GGUF file that are read, that byte-level BPE does not need, and that must be off.
READ = {
    *("model", "pre", "tokens", "token_type", "merges", "add_bos_token", "bos_token_id", "eos_token_id"),
    *("eot_token_id", "eom_token_id"),
}
NOT_NEEDED = {
    *("scores", "unknown_token_id", "seperator_token_id", "padding_token_id", "mask_token_id", "cls_token_id"),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *("prefix_token_id", "suffix_token_id", "middle_token_id"),  # their older names
}
OFF = {"add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"}


class Text:
    """Converts text to tokens and back, with the end tokens and the chat template.

    `bos` is put before each text; None if the tokenizer adds it or if texts have none. With `add_special_tokens=False`
    the tokenizer does not add it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: set[int],
        template: str | None,
        bos: int | None,
        names: dict[str, Any],
        add_special_tokens: bool = True,
    ):
        self.tokenizer, self.end, self.template, self.bos, self.names = tokenizer, end, template, bos, names
        self.add_special_tokens = add_special_tokens

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=self.add_special_tokens).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def encode_chat(self, message: str) -> list[int]:
        """The tokens of one user message in the model's chat template, up to the start of the answer."""
        if self.template is None:
            raise ValueError("This model has no chat template: remove --chat.")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )  # as in transformers, with these two functions
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
        messages = [{"role": "user", "content": message}]
        try:
            text = environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=True, **self.names
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"The chat template of this model fails: {error}. Remove --chat.") from error
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class Stream:
    """Passes the text of new tokens to `show`, as soon as it consists of whole characters."""

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
    """The tokenizer from the metadata of a checkpoint: those of a GGUF file, or `{"folder": ...}`."""
    return _from_folder(metadata["folder"]) if "folder" in metadata else _from_gguf(metadata)


# -- GGUF -------------------------------------------------------------------------------------------------------------


def _from_gguf(metadata: dict[str, Any]) -> Text:

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    _check_gguf(metadata)
    tokens, kinds = get("tokens"), get("token_type")
    ids = {name: _token_id(get(f"{name}_token_id"), len(tokens), name) for name in ("bos", "eos", "eot", "eom")}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    llama3 = get("pre") == LLAMA3  # it does not split words that are tokens, and adds bos to each text
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    except Exception as error:  # it raises no other
        raise ValueError(f"No byte-level BPE: tokenizer.ggml.merges ({error}).") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[get("pre")]()
    tokenizer.decoder = decoders.ByteLevel()
    of_kind = lambda *chosen: [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind in chosen]
    tokenizer.add_special_tokens(of_kind(CONTROL, UNKNOWN))
    tokenizer.add_tokens(of_kind(USER_DEFINED))
    if get("add_bos_token", llama3) and ids["bos"] is None:
        raise ValueError("The first token of texts is missing: tokenizer.ggml.add_bos_token without bos_token_id.")
    return Text(
        tokenizer,
        end={token for name in ("eos", "eot", "eom") if (token := ids[name]) is not None},
        template=metadata.get("tokenizer.chat_template"),
        bos=ids["bos"] if get("add_bos_token", llama3) else None,
        names={f"{name}_token": "" if ids[name] is None else tokens[ids[name]] for name in ("bos", "eos")},
    )


def _check_gguf(metadata: dict[str, Any]) -> None:
    """Raises if the tokenizer is of an unsupported kind, or has unknown settings."""
    settings = {
        name.removeprefix("tokenizer.ggml."): x for name, x in metadata.items() if name.startswith("tokenizer.ggml.")
    }
    model, pre = settings.get("model"), settings.get("pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise NotImplementedError(f"Only byte-level BPE with {sorted(PRE_TOKENIZERS)}: model={model!r}, pre={pre!r}.")
    wrong = [
        f"{name}={x!r}"[:60] for name, x in settings.items() if name not in READ | NOT_NEEDED and (x or name not in OFF)
    ]
    if wrong:
        raise NotImplementedError(f"Tokenizers with these settings are not supported: tokenizer.ggml. {wrong}.")
    tokens, kinds = settings.get("tokens"), settings.get("token_type")
    if not tokens or settings.get("merges") is None or kinds is None or len(kinds) != len(tokens):
        raise ValueError(
            "A tokenizer has tokenizer.ggml.tokens, merges, and a token_type for each token, without which control "
            f"tokens would be read as text: {len(tokens or [])} tokens, {len(kinds or [])} types, "
            f"{len(settings.get('merges') or [])} merges."
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError("Two tokens are equal: tokenizer.ggml.tokens.")
    unknown = set(kinds) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}
    if unknown:
        raise NotImplementedError(
            f"Tokens of these kinds are not supported: tokenizer.ggml.token_type={sorted(unknown)}."
        )


def _token_id(value: Any, count: int, name: str) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise ValueError(f"A token is one of {count}: {name}_token_id={value!r}.")
    return value


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Text:
    """As transformers: without a setting in tokenizer_config.json, tokenizer.json adds the first token."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"There is no tokenizer.json in {str(folder)!r}: other kinds are not supported.")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # it raises no other
        raise ValueError(f"No tokenizer: {str(folder / 'tokenizer.json')!r} ({error}).") from error
    tokenizer.no_truncation()  # as transformers does: the file may have the truncation of its training
    tokenizer.no_padding()
    read = lambda name: read_json(folder / name) if (folder / name).exists() else {}
    settings = read("tokenizer_config.json")
    if settings.get("add_eos_token"):
        raise NotImplementedError(f"A prompt must not end with an end token: add_eos_token=True in {str(folder)!r}.")
    _check_added(tokenizer, settings, folder)
    contents = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    add_bos = settings.get("add_bos_token")
    bos = tokenizer.token_to_id(contents["bos_token"]) if add_bos and contents["bos_token"] else None
    if add_bos and bos is None:
        raise ValueError(f"The first token of texts is missing: add_bos_token without bos_token in {str(folder)!r}.")
    return Text(
        tokenizer,
        end=_ends(read),
        template=_template(folder, settings),
        bos=bos,
        names={name: token for name, token in contents.items() if token or name in ("bos_token", "eos_token")},
        add_special_tokens=add_bos is None,
    )


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _check_added(tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Raises if the two files that list added tokens differ; transformers reads both."""
    added = {int(i): _content(token) for i, token in settings.get("added_tokens_decoder", {}).items()}
    wrong = {i: token for i, token in added.items() if tokenizer.id_to_token(i) != token}
    if wrong:
        raise ValueError(f"tokenizer.json lacks added tokens of tokenizer_config.json, in {str(folder)!r}: {wrong}.")


def _ends(read: Callable[[str], dict[str, Any]]) -> set[int]:
    """The end tokens of generation_config.json, or else of config.json, as in transformers."""
    generation = read("generation_config.json")
    end: Any = generation["eos_token_id"] if "eos_token_id" in generation else read("config.json").get("eos_token_id")
    ends = [token for token in (end if isinstance(end, list) else [end]) if token is not None]
    wrong = [token for token in ends if type(token) is not int or token < 0]
    if wrong:
        raise ValueError(f"A token is a number: eos_token_id={end!r}.")
    return set(ends)


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template; newer folders have a file for it, some older ones several templates with names."""
    path = folder / "chat_template.jinja"
    template: Any = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
