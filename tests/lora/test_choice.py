"""`NAME:strength`: which file, how strongly."""

import pytest

from lcexport.configs.errors import InputError, UsageError
from lcexport.lora import choice_from


@pytest.fixture
def folder(tmp_path):
    """Files with and without the ending, and with colons in their names."""
    for name in ("cfg_step_lora", "style", "odd:0.5", "odd"):
        (tmp_path / f"{name}.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("word", "file", "strength"),
    [
        ("cfg_step", "cfg_step_lora", 1.0),
        ("cfg_step:0.25", "cfg_step_lora", 0.25),
        ("style:-2", "style", -2.0),
        ("odd:0.5", "odd:0.5", 1.0),
        ("odd:0.5:0.75", "odd:0.5", 0.75),
        ("odd:1e-1", "odd", 0.1),
    ],
)
def test_names_in_the_checkpoints_folder(folder, word, file, strength):
    choice = choice_from(word, folder)
    assert (choice.path.stem, choice.strength) == (file, strength)


@pytest.mark.parametrize(
    ("end", "file", "strength"),
    [
        ("style.safetensors", "style", 1.0),
        ("style.safetensors:0.5", "style", 0.5),
        ("odd:0.5.safetensors", "odd:0.5", 1.0),
        ("odd:0.5.safetensors:3", "odd:0.5", 3.0),
    ],
)
def test_paths(folder, end, file, strength):
    choice = choice_from(f"{folder}/{end}")
    assert (choice.path.stem, choice.strength) == (file, strength)


@pytest.mark.parametrize("word", ["nothing", "nothing:0.5", "style:strong", "", ":1"])
def test_no_such_lora_says_which_there_are(folder, word):
    with pytest.raises(InputError, match=r"there is no LoRA .*folder: cfg_step_lora, odd"):
        choice_from(word, folder)


def test_a_name_is_not_looked_up_without_a_folder(folder):
    with pytest.raises(InputError, match="there is no LoRA file cfg_step"):
        choice_from("cfg_step")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_strength_is_finite(folder, number):
    with pytest.raises(UsageError, match="finite number"):
        choice_from(f"style:{number}", folder)
