"""`lcexport lora` and `build --lora` from the command line."""

import json

from lora_files import LORA_A, LORA_B, SIZE, digests


def test_bake_inspect_and_remove(run, bundle):
    before = digests(bundle)
    code, out, _ = run("lora", "bake", bundle, f"{LORA_A}:0.5", LORA_B, "--no-golden")
    assert code == 0
    assert "lora_a x 0.5 (baked" in out
    assert f"no golden outputs for {SIZE}" in out
    assert "lora_b x 1 (baked" in run("inspect", bundle)[1]
    code, out, _ = run("lora", "remove", bundle, "--json")
    assert code == 0
    assert json.loads(out)["loras"] == []
    assert digests(bundle) == before
    code, _, err = run("lora", "remove", bundle)
    assert code == 2
    assert "no LoRA was baked" in err


def test_a_lora_is_shown_by_kind_of_module(run, bundle):
    code, out, _ = run("lora", "inspect", LORA_A, "--bundle", bundle)
    assert code == 0
    assert next(line for line in out.splitlines() if "attn.qkv" in line).split() == [
        "blocks.*.attn.qkv", "3", "768", "x", "256", "8", "3", "0.5",
    ]  # fmt: skip
    assert f"themodelof{bundle}" in "".join(out.split())
    code, out, _ = run("lora", "inspect", LORA_B, "--json")
    document = json.loads(out)
    assert (code, document["fits"], len(document["modules"])) == (0, None, 6)
    assert document["modules"]["blocks.0.attn.qkv"] == {
        "shape": [768, 256], "rank": 8, "blocks": 3, "alpha_scale": 0.75,
    }  # fmt: skip


def test_a_lora_of_another_model_is_exit_code_3(run, bundle, make_lora):
    foreign = make_lora(modules=("blocks.3.ffn.w1",))
    for words in (
        ("lora", "inspect", foreign, "--bundle", bundle),
        ("lora", "bake", bundle, foreign),
    ):
        code, out, err = run(*words)
        assert (code, out) == (3, "")
        assert "blocks.3.ffn.w1 is no Linear layer of this model" in err
    code, _, err = run("lora", "bake", bundle, "nothing.safetensors:0.5")
    assert code == 3
    assert "there is no LoRA file nothing.safetensors" in err


def test_a_build_with_a_lora_that_is_not_there_writes_nothing(run, golden_checkpoint, tmp_path):
    words = ("build", "--model", golden_checkpoint, "--res", SIZE, "-o", tmp_path / "x")
    code, _, err = run(*words, "--lora", "nothing")
    assert code == 3
    assert "got in that folder: a_lora, b" in err
    assert list(tmp_path.iterdir()) == []
