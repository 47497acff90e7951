"""Tokenizers of GGUF files and folders: what they say is done or refused."""

import json
import re
from typing import Any

import pytest
import small_model
import tokens

# -- tokens of GGUF files ---------------------------------------------------------------------------------------------

LETTERS = ["<s>", "</s>", "<|end|>", "a", "b", "ab", "[TOOL]", "<odd>"]
TOKENS: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": LETTERS,
    "token_type": [3, 3, 3, 1, 1, 1, 4, 2],
    "merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def text_of(**settings):
    merged = {name: x for name, x in {**TOKENS, **settings}.items() if x is not None}
    return tokens.load_text({f"tokenizer.ggml.{name}": x for name, x in merged.items()})


def test_control_and_user_defined_tokens():
    text = text_of()
    assert text.encode("ab[TOOL]a<|end|>b<odd>") == [5, 6, 3, 2, 4, 7]
    assert text.decode([5, 6, 3, 2, 4]) == "ab[TOOL]ab"


def test_the_end_of_a_turn_ends_a_text():
    assert text_of().end == {1}
    assert text_of(eot_token_id=2).end == {1, 2}
    assert text_of(eot_token_id=2, eom_token_id=6).end == {1, 2, 6}
    assert text_of(eos_token_id=None).end == set()


def test_the_first_token():
    assert text_of().encode("a") == [3]
    assert text_of(add_bos_token=True).encode("a") == [0, 3]
    assert text_of(pre="llama-bpe").encode("a") == [0, 3]  # unless the file says otherwise
    assert text_of(pre="llama-bpe", add_bos_token=False).encode("a") == [3]


def test_llama3_takes_words_as_they_are():
    assert text_of(merges=[], pre="llama-bpe", add_bos_token=False).encode("ab") == [5]
    assert text_of(merges=[]).encode("ab") == [3, 4]


WRONG_TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "sentencepiece": (dict(model="llama"), "Only byte-level BPE with .*: model='llama', pre='gpt-2'"),
    "other words": (dict(pre="qwen2"), "Only byte-level BPE with .*: model='gpt2', pre='qwen2'"),
    "no words": (dict(pre=None), "Only byte-level BPE with .*pre=None"),
    "no types": (dict(token_type=None), "a token_type for each token, .*: 8 tokens, 0 types, 1 merges"),
    "few types": (dict(token_type=[1]), "8 tokens, 1 types"),
    "no merges": (dict(merges=None), "8 tokens, 8 types, 0 merges"),
    "bytes": (dict(token_type=[3, 3, 3, 1, 1, 1, 6, 1]), r"not supported: tokenizer.ggml.token_type=\[6\]"),
    "an end for each text": (dict(add_eos_token=True), r"not supported: tokenizer.ggml. \['add_eos_token=True'\]"),
    "spaces": (dict(add_space_prefix=True), "add_space_prefix=True"),
    "characters": (dict(precompiled_charsmap=[1, 2]), "precompiled_charsmap="),
    "new": (dict(something=False), "something=False"),
    "an end that is no token": (dict(eos_token_id=8), "A token is one of 8: eos_token_id=8"),
    "an end that is text": (dict(eot_token_id="</s>"), "A token is one of 8: eot_token_id='</s>'"),
    "no beginning": (dict(add_bos_token=True, bos_token_id=None), "add_bos_token without bos_token_id"),
    "a token twice": (dict(tokens=[*LETTERS[:-1], "a"]), "Two tokens are equal"),
    "a merge of nothing": (dict(merges=["a x"]), "No byte-level BPE: tokenizer.ggml.merges"),
    "a merge of three": (dict(merges=["a b a"]), "No byte-level BPE: tokenizer.ggml.merges"),
}


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_tokens_that_are_not_understood(name):
    settings, message = WRONG_TOKENS[name]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        text_of(**settings)


# -- tokens of folders ------------------------------------------------------------------------------------------------


def tokens_with(folder, change=lambda tokenizer: None, generation=None, **settings):
    small_model.write(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return tokens.load_text({"folder": folder})


def test_a_tokenizer_does_not_cut_texts(tmp_path):
    """Its file says how its trainer did."""

    def cut(tokenizer):
        tokenizer["truncation"] = dict(max_length=3, strategy="LongestFirst", stride=0, direction="Right")
        tokenizer["padding"] = dict(
            strategy=dict(Fixed=20), direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="!"
        )

    assert len(tokens_with(tmp_path, cut).encode("longer than three")) == len("longer than three")


def test_the_end_of_a_text_in_a_folder(tmp_path):
    assert tokens_with(tmp_path).end == {299}
    assert tokens_with(tmp_path, generation=dict(eos_token_id=[1, 2])).end == {1, 2}
    assert tokens_with(tmp_path, generation=dict(eos_token_id=None)).end == set()
    with pytest.raises(ValueError, match="A token is a number: eos_token_id='</s>'"):
        tokens_with(tmp_path, generation=dict(eos_token_id="</s>"))


def test_the_first_token_in_a_folder(tmp_path):
    assert tokens_with(tmp_path, add_bos_token=True, bos_token="!").encode("a") == [
        0,
        *tokens_with(tmp_path).encode("a"),
    ]
    with pytest.raises(ValueError, match="first token of texts is missing: add_bos_token"):
        tokens_with(tmp_path, add_bos_token=True)
    with pytest.raises(NotImplementedError, match="add_eos_token=True"):
        tokens_with(tmp_path, add_eos_token=True)


def test_a_chat_template_of_its_own(tmp_path):
    text = tokens_with(tmp_path)
    named = [dict(name="tool_use", template="x"), dict(name="default", template="{{ messages[0].content }}?")]
    assert text.decode(tokens_with(tmp_path, chat_template=named).encode_chat("a")) == "a?"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    text = tokens.load_text({"folder": tmp_path})
    assert text.decode(text.encode_chat("a")) == "a!"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('No system, no answer') }}")
    with pytest.raises(ValueError, match="The chat template of this model fails: No system, no answer"):
        tokens.load_text({"folder": tmp_path}).encode_chat("a")


def test_tokenizers_that_are_not_right(tmp_path):
    with pytest.raises(ValueError, match=re.escape("lacks added tokens of tokenizer_config.json")):
        tokens_with(tmp_path, added_tokens_decoder={"300": dict(content="<tool>")})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"No tokenizer: '.*tokenizer.json' \("):
        tokens.load_text({"folder": tmp_path})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no tokenizer.json in"):
        tokens.load_text({"folder": tmp_path})
