"""The training loop: stopped and continued, it ends where it would have ended."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lcexport.configs.errors import UsageError
from tools.train_toy.training import Plan, Training, alone, generator_at, read_log

PLAN = Plan(steps=12, rate=1e-2, warmup=3, average=0.9)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(module: nn.Module):
    def loss_at(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(8, 3, generator=generator_at(0, step))
        return {"squared": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    return loss_at


def train(module: nn.Module, folder, plan: Plan = PLAN) -> Training:
    training = Training(module, plan, folder, "small")
    training.run(loss_of(module))
    return training


def test_it_learns(tmp_path):
    module = small()
    before = loss_of(module)(99)["squared"].item()
    train(module, tmp_path, Plan(steps=100, rate=3e-2, warmup=3))
    assert loss_of(module)(99)["squared"].item() < before / 4


def test_a_stopped_training_ends_at_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(small(), tmp_path / "whole")

    first = Training(small(), PLAN, tmp_path / "parts", "small")
    loss_at = loss_of(first.module)
    while first.step < 5:
        first.advance(loss_at(first.step)["squared"])
    first.save()
    parts = train(small(), tmp_path / "parts")

    assert parts.step == 12
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, parts.parameters[name])
        assert torch.equal(whole.averaged[name], parts.averaged[name])


def test_a_finished_training_is_not_trained_again(tmp_path):
    train(small(), tmp_path)
    again = Training(small(), PLAN, tmp_path, "small")
    again.run(lambda step: {"never": torch.tensor(float("nan"))})
    assert again.done
    assert all(torch.isfinite(p).all() for p in again.parameters.values())


def test_a_training_of_another_plan_is_not_continued(tmp_path):
    train(small(), tmp_path)
    with pytest.raises(UsageError, match=r"of another training; got .*steps=12.*; wanted .*=13"):
        train(small(), tmp_path, replace(PLAN, steps=13))


def test_a_training_of_another_recipe_is_not_continued(tmp_path):
    train(small(), tmp_path)
    with pytest.raises(UsageError, match=r"of another training; .* wanted .* other crops"):
        Training(small(), PLAN, tmp_path, "small", "other crops").run(loss_of(small()))


def test_a_state_that_does_not_say_its_plan_is_continued(tmp_path):
    training = train(small(), tmp_path)
    save_file(load_file(training.state_path), training.state_path, metadata={"step": "12"})
    assert train(small(), tmp_path, replace(PLAN, steps=13)).step == 13


def test_a_second_training_of_a_part_waits_for_the_first_and_does_nothing_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("tools.train_toy.training.LOG_EVERY", 4)
    module = small()
    second = threading.Thread(target=train, args=(module, tmp_path))
    with alone(tmp_path / "small.training.safetensors"):
        second.start()
        first = Training(small(), PLAN, tmp_path, "small")
        first.finish(loss_of(first.module))
        assert second.is_alive()
    second.join(timeout=60)
    steps = [json.loads(line)["step"] for line in first.log_path.read_text().splitlines()]
    assert steps == [4, 8, 12]
    assert all(map(torch.equal, module.parameters(), first.module.parameters()))


def test_parameters_named_so_learn_at_the_full_rate(tmp_path):
    module = small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    plan = Plan(steps=1, rate=1e-2, warmup=1, weight_decay=0.0, full_rate="2.", slower=0.01)
    train(module, tmp_path, plan)
    moved = {n: (p - before[n]).abs().max().item() for n, p in module.named_parameters()}
    assert moved["2.weight"] > 50 * moved["0.weight"] > 0


def test_the_rate_rises_and_falls():
    plan = Plan(steps=100, rate=1.0, warmup=10)
    rates = [plan.rate_at(step) for step in range(101)]
    assert max(rates) == rates[9] > 0.95
    assert rates[0] == 0.1
    assert abs(rates[100] - 0.05) < 1e-6


def test_of_a_log_with_a_step_twice_the_later_line_counts(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 0.9}, {"step": 40, "loss": 0.8}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(path) == [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 0.8}]
