"""The demo: a small model of random weights here, the real one against transformers."""

import functools
import json
import re
from dataclasses import replace

import generate
import jax
import jax.numpy as jnp
import numpy as np
import own_process
import pytest
import small_model
from checkpoints import load_checkpoint, load_folder
from llama import Llama, LlamaConfig, cache_bytes_per_token, next_token
from skins import needs_modes
from small_model import SMALL
from tokens import Stream, load_text

import mqa_jax


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return small_model.write(tmp_path_factory.mktemp("model"))


@functools.cache
def _generator(path):
    config, params, metadata = load_checkpoint(path)
    return generate.Generator(config, params), load_text(metadata)


def _greedy_without_cache(generator, prompt, count):
    """The definition: the whole text again for every token. What stands behind a token does not matter to it."""
    read = jax.jit(lambda tokens: generator.model.apply({"params": generator.params}, tokens))
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    for position in range(len(prompt), tokens.shape[1]):
        tokens[0, position] = read(tokens)[0, position - 1].argmax()
    return tokens[0, len(prompt) :].tolist()


def test_cached_generation_is_generation_without_a_cache(folder):
    generator, text = _generator(folder)
    prompt = text.encode("Once upon a time")
    shown: list[int] = []
    answer = generator(prompt, generate.Sampling(max_tokens=12), shown.append)
    assert answer.tokens == _greedy_without_cache(generator, prompt, 12)
    assert shown == answer.tokens
    assert answer.prompt_tokens == len(prompt)
    assert answer.cache_bytes == cache_bytes_per_token(generator.config) * (32 + 12)


@needs_modes
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_model_in_nnx_writes_the_same(folder, cache_dtype):
    """And its logits are the same numbers, up to rounding."""
    config, params, metadata = load_checkpoint(folder)
    config = replace(config, cache_dtype=cache_dtype)
    generators = [generate.Generator(config, params, api) for api in ("linen", "nnx")]
    for prompt in ("Hello", "def f(x):", "1, 2, 3"):
        tokens = load_text(metadata).encode(prompt)
        linen, nnx = (generator(tokens, generate.Sampling(12)) for generator in generators)
        assert (nnx.tokens, nnx.cache_bytes) == (linen.tokens, linen.cache_bytes)
    logits = []
    for generator in generators:
        cache = generator.api.new_cache(16)
        logits.append(generator.api.call(generator.params, cache, jnp.arange(8)[None])[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_it_stops_at_the_end_of_the_text(folder):
    generator, text = _generator(folder)
    prompt = text.encode("Once")
    tokens = generator(prompt, generate.Sampling(max_tokens=12)).tokens
    end = tokens[5]
    stopped = generator(prompt, generate.Sampling(max_tokens=12, end=(end,))).tokens
    assert stopped == tokens[: tokens.index(end) + 1]


@pytest.mark.slow
def test_temperature_draws_from_the_distribution(folder):
    generator, text = _generator(folder)
    prompt = text.encode("Once")
    draw = lambda seed, temperature: generator(prompt, generate.Sampling(8, temperature), seed=seed).tokens
    assert draw(0, 1.0) == draw(0, 1.0)
    assert draw(0, 1.0) != draw(1, 1.0)
    assert draw(0, 1e-6) == generator(prompt, generate.Sampling(8)).tokens
    logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: next_token(logits, 1.0, key))(keys)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.1, 0.6, 0.3], atol=0.03)


@pytest.mark.parametrize("chat", [False, True])
def test_from_the_command_line(folder, capsys, chat):
    arguments = ["--model", str(folder), "--prompt", "Hello", "--max-tokens", "5", *(["--chat"] if chat else [])]
    answer = generate.main(arguments)
    printed = capsys.readouterr().out
    assert "2 layers, 6 query heads on 2 key/value heads" in printed
    assert _generator(folder)[1].decode(answer.tokens).rstrip("\N{REPLACEMENT CHARACTER}") in printed
    assert "tokens/s" in printed
    assert f"{answer.cache_bytes / 2**20:.1f} MiB (0.2 KiB a token) with 2 key/value heads" in printed
    assert answer.prompt_tokens == (len("<user>Hello<a>") if chat else len("Hello"))


def test_a_cache_in_8_bits_from_the_command_line(folder, capsys):
    answer = generate.main(["--model", str(folder), "--prompt", "Hello", "--max-tokens", "5", "--cache-dtype", "int8"])
    layers, heads, features, scale = 2, 2, 8, 4
    assert answer.cache_bytes == (32 + 5) * 2 * layers * heads * (features + scale)
    assert "(0.1 KiB a token)" in capsys.readouterr().out


WRONG = {
    "a path": (
        ["--model", "/nowhere"],
        "A model is a .gguf file or a folder .* path='/nowhere', which does not exist",
    ),
    "no tokens": (["--max-tokens", "0"], "At least one token is generated: max_tokens=0"),
    "fewer tokens": (["--max-tokens=-3"], "At least one token is generated: max_tokens=-3"),
    "a temperature": (["--temperature=-1"], r"A temperature is 0 or a positive number: temperature=-1\.0"),
    "no temperature": (["--temperature", "nan"], "A temperature is 0 or a positive number: temperature=nan"),
    "no prompt": (["--prompt", ""], "A prompt must not be empty: --prompt=''"),
    "a long prompt": (["--prompt", "x" * 300], "trained on 256 positions: prompt=300 tokens, max_tokens=64"),
    "a long answer": (["--max-tokens", "1000"], "trained on 256 positions: prompt=24 tokens, max_tokens=1000"),
    "a seed": (["--seed=-1"], "argument --seed: a seed is less than .*, and not negative: -1"),
    "a number": (["--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
    "an option": (["--beams", "4"], "unrecognized arguments: --beams 4"),
    "a dtype": (["--cache-dtype", "int4"], "argument --cache-dtype: invalid choice: 'int4'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_the_command_line_is_said_in_a_sentence(folder, capsys, name):
    arguments, message = WRONG[name]
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", str(folder), *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "error: There is no tokenizer.json in"),
        (lambda folder: (folder / "config.json").write_text("{"), "error: '.*config.json' is not JSON: Expecting"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), "names files that are not in"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no chat template: remove --chat"),
    ],
)
def test_a_model_that_is_not_right_is_said_in_a_sentence(tmp_path, capsys, break_it, message):
    break_it(small_model.write(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", str(tmp_path), "--chat"])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, said), said


def test_a_tokenizer_of_another_model(folder):
    generator, _ = _generator(folder)
    with pytest.raises(ValueError, match=r"does not belong to the model, which has 300 tokens: the text has \[300\]"):
        generator([0, 300], generate.Sampling(3))
    with pytest.raises(ValueError, match="The prompt must have at least one token"):
        generator([], generate.Sampling(3))


def test_the_whole_context_can_be_used(folder):
    """Padding does not count."""
    generator, _ = _generator(folder)
    assert len(generator([0] * 33, generate.Sampling(256 - 33)).tokens) == 256 - 33


def test_a_text_that_is_too_long(folder):
    generator, _ = _generator(folder)
    with pytest.raises(ValueError, match="trained on 256 positions: prompt=250 tokens, max_tokens=20"):
        generator([0] * 250, generate.Sampling(20))


def test_text_is_shown_as_whole_characters(folder):
    _, text = _generator(folder)
    shown: list[str] = []
    stream = Stream(text, shown.append)
    for token in text.encode("né€🙂!"):
        stream(token)
    assert shown == ["n", "é", "€", "🙂", "!"]


def test_wrong_models(tmp_path, folder):
    with pytest.raises(ValueError, match=r"a .gguf file or a folder with config.json: path="):
        load_checkpoint(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "gpt2"}))
    with pytest.raises(NotImplementedError, match="Only llama models: model_type='gpt2'"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        load_folder(tmp_path)


def test_one_forward_pass_for_any_number_of_key_value_heads():
    for kv_heads in (1, 2, 4):
        config = LlamaConfig(
            vocabulary=11, layers=1, dim=16, hidden=16, heads=4, kv_heads=kv_heads, head_dim=4, max_length=32
        )
        tokens = jnp.zeros((2, 5), jnp.int32)
        logits, _ = Llama(config).init_with_output(jax.random.key(0), tokens)
        assert logits.shape == (2, 5, 11)
        cache = mqa_jax.init_cache(Llama(config), 2, 7, tokens)
        assert mqa_jax.cache_bytes(cache) == 2 * 7 * cache_bytes_per_token(config)


# -- against transformers ---------------------------------------------------------------------------------------------

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n    ",
]
TOKENS = 31  # behind each prompt


def _transformers():
    """The same GGUF in transformers, float32."""
    import torch
    from checkpoints import default_model
    from transformers import AutoModelForCausalLM

    path = default_model()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all tokens, whatever they are
    return model


def _write_answers(path: str) -> None:
    """Of the real model."""
    generator, text = _generator(None)
    prompts = [text.encode(prompt) for prompt in PROMPTS]
    answers = [generator(ids, generate.Sampling(max_tokens=TOKENS)).tokens for ids in prompts]
    long = text.encode(" ".join(PROMPTS) * 4)[:64]
    logits = jax.jit(generator.model.apply)({"params": generator.params}, jnp.array([long]))
    np.savez(path, prompts=np.array(prompts, object), answers=np.array(answers), long=long, logits=logits)


@pytest.mark.slow
@pytest.mark.torch
def test_the_real_model_is_that_of_transformers(tmp_path, monkeypatch):
    """Greedy tokens of each prompt, and the logits of a text of 64 tokens."""
    import torch

    own_process.read_gguf_once(monkeypatch)
    own_process.run(f"import test_generate; test_generate._write_answers({str(tmp_path / 'ours.npz')!r})")
    ours, peer = np.load(tmp_path / "ours.npz", allow_pickle=True), _transformers()
    for ids, answer in zip(ours["prompts"], ours["answers"]):
        expected = peer.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        assert answer.tolist() == expected[0, len(ids) :].tolist()
    assert len(ours["long"]) == 64
    with torch.no_grad():
        expected = peer(torch.tensor(ours["long"])[None]).logits.numpy()
    np.testing.assert_allclose(ours["logits"], expected, atol=1e-3)


@pytest.mark.torch
def test_a_hugging_face_folder_is_what_transformers_reads(folder):
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator, text = _generator(folder)
    ids = text.encode("What it reads, and how.")
    with torch.no_grad():
        expected = other(torch.tensor([ids])).logits.numpy()
    actual = generator.model.apply({"params": generator.params}, jnp.array([ids]))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.torch
def test_tokens_are_those_of_transformers(monkeypatch):
    import gguf
    from checkpoints import default_model
    from transformers import AutoTokenizer

    own_process.read_gguf_once(monkeypatch)
    path = default_model()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fields = gguf.GGUFReader(path).fields
    text = load_text({name: field.contents() for name, field in fields.items()})
    for sentence in [*PROMPTS, "In 2026, 12,345 naïve cafés opened… 🙂\n\n\tIsn't it?"]:
        assert text.encode(sentence) == tokenizer(sentence)["input_ids"]
        assert text.decode(text.encode(sentence)) == sentence
