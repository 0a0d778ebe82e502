"""Prompt cleaning and the encoder against the original, from the same token ids."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.runtime.text import Text, TextCache, TextEncoder, clean_prompt


@pytest.fixture(scope="module")
def encoder(text_folder):
    return TextEncoder(text_folder, text_tokens=12)


def test_prompts_are_cleaned_as_in_the_original(golden):
    cases = golden("text").meta["prompt_clean"]
    assert {text: clean_prompt(text) for text in cases} == cases


def test_golden_embeddings(golden, encoder):
    case = golden("text")
    result = encoder.encode_ids(case["input_ids"], case["attention_mask_in"])
    assert result.embeds.shape == (4, 1, 12, 64)
    # the rows: two prompts, the negative prompt (stored once per prompt), the empty one
    expected = [case["prompt_embeds"], case["negative_prompt_embeds"][:1]]
    expected = torch.cat([*expected, case["negative_default_embeds"]])
    torch.testing.assert_close(result.embeds, expected, rtol=0, atol=2e-5)
    masks = [case["prompt_attention_mask"], case["negative_attention_mask"][:1]]
    masks = torch.cat([*masks, case["negative_default_mask"]])
    assert torch.equal(result.mask, masks.bool())


def counted(prompts_seen: list[list[str]]):
    """An encoder whose embedding is the prompt's length, and which notes what it was asked."""

    def encode(prompts: list[str]) -> Text:
        prompts_seen.append(prompts)
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return Text(lengths.view(-1, 1, 1, 1), torch.ones(len(prompts), 1, dtype=torch.bool))

    return encode


def test_a_prompt_is_encoded_once(encoder):
    cache, seen = TextCache(), []
    first = cache.rows(["a cat", "", "a cat"], counted(seen))
    again = cache.rows(["", "a bird"], counted(seen))
    assert seen == [["a cat", ""], ["a bird"]]
    assert first.embeds.flatten().tolist() == [5, 0, 5]
    assert again.embeds.flatten().tolist() == [0, 6]
    kept = cache.rows(["a cat"], encoder.encode)
    assert kept.embeds.flatten().tolist() == [5], "what is kept is not encoded again"


def test_the_prompt_used_longest_ago_is_forgotten():
    cache, seen = TextCache(size=2), []
    for prompts in (["a"], ["b"], ["a"], ["c"], ["a"], ["b"]):
        cache.rows(prompts, counted(seen))
    assert seen == [["a"], ["b"], ["c"], ["b"]]


def test_a_row_does_not_keep_its_batch_in_memory():
    cache = TextCache(size=1)
    cache.rows([f"prompt {number}" for number in range(50)], counted([]))
    (kept,) = cache._rows.values()
    assert kept.embeds.untyped_storage().nbytes() == kept.embeds.nbytes
    assert kept.mask.untyped_storage().nbytes() == kept.mask.nbytes


def test_more_prompts_than_are_kept_are_all_encoded():
    seen = []
    text = TextCache(size=2).rows(["a", "bb", "ccc"], counted(seen))
    assert text.embeds.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("prompt", [None, 3, ["a cat"]])
def test_what_is_no_text_is_refused_before_it_is_looked_for(prompt):
    with pytest.raises(UsageError, match="a prompt is not text"):
        TextCache().rows([prompt], counted([]))


def test_encode_pads_and_keeps_the_padding_rows(encoder):
    text = encoder.encode(["a cat plays", ""])
    assert text.embeds.shape == (2, 1, 12, 64)
    assert text.embeds.dtype == torch.float32
    assert text.mask.dtype == torch.bool
    assert text.mask.sum(1).tolist() == [4, 1]  # the end token counts
    assert text.embeds[0, 0, 4:].abs().min() > 0


def test_an_embedding_does_not_depend_on_its_neighbours(encoder):
    batch = encoder.encode(["a cat", "a dog plays the drums"])
    alone = encoder.encode(["a dog plays the drums"])
    assert torch.equal(batch.embeds[1:], alone.embeds)


def test_a_long_prompt_is_cut_with_one_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING, "lcexport"):
        text = encoder.encode(["cat " * 30])
    assert text.mask.all()
    assert [r.message for r in caplog.records if r.name.startswith("lcexport")] == [
        "a prompt has 31 tokens: the first 12 are used, the rest is ignored"
    ]


def test_bfloat16_embeddings_are_rounded_then_widened(text_folder):
    text = TextEncoder(text_folder, 12, torch.bfloat16).encode(["a cat"])
    assert text.embeds.dtype == torch.float32
    assert torch.equal(text.embeds, text.embeds.bfloat16().float())


def test_prompt_limits():
    assert clean_prompt("a" * 100_000)
    with pytest.raises(UsageError, match="too long; got 100001 characters"):
        clean_prompt("a" * 100_001)
    with pytest.raises(UsageError, match="not text"):
        clean_prompt(3)  # pyright: ignore[reportArgumentType]


def test_a_broken_character_is_replaced():
    # half a surrogate pair has no UTF-8 form; the tokenizer would fail on it
    assert clean_prompt("cat \ud800") == "cat \N{REPLACEMENT CHARACTER}"


def test_loading_draws_nothing(text_folder, capfd):
    from transformers.utils import logging as switch

    before = switch.is_progress_bar_enabled()
    TextEncoder(text_folder, text_tokens=12)
    assert capfd.readouterr() == ("", "")
    assert switch.is_progress_bar_enabled() == before


def test_closing_twice_is_harmless(text_folder):
    encoder = TextEncoder(text_folder, text_tokens=12).to("cpu")
    encoder.close()
    encoder.close()
    with pytest.raises(UsageError, match="closed"):
        encoder.encode(["a cat"])


def test_missing_files_are_named(tmp_path, text_folder):
    shutil.copytree(text_folder / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"no usable text encoder in .*text_encoder"):
        TextEncoder(tmp_path)
    with pytest.raises(InputError, match=r"no usable tokenizer in .*tokenizer"):
        TextEncoder(tmp_path / "nowhere")


def test_missing_weights_are_not_made_up(tmp_path, text_folder):
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "text_encoder/model.safetensors"
    weights = load_file(path)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    path.unlink()
    save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"lacks weights.*{name}"):
        TextEncoder(tmp_path, text_tokens=12)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\0\xff"])
def test_a_damaged_tokenizer_is_one_error(tmp_path, text_folder, content):
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer/tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"no usable tokenizer in .*tokenizer; got .*Download"):
        TextEncoder(tmp_path)


def test_a_weight_of_nan_is_refused_where_it_shows(tmp_path, text_folder):
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "text_encoder/model.safetensors"
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"][0] = torch.nan
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    encoder = TextEncoder(tmp_path, text_tokens=12)
    with pytest.raises(VerificationError, match="text encoder gave numbers that are not finite"):
        encoder.encode(["a cat"])


def test_the_fixture_is_the_golden_configuration(golden, text_folder):
    config = json.loads((text_folder / "text_encoder/config.json").read_text("utf-8"))
    assert config.items() >= golden("text").meta["umt5_config"].items()
