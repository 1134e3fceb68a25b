"""What goes wrong in a run: figures that are no numbers, and memory that runs out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback, TrainingArguments

from loraport.clients.errors import Refused, ResourceError
from loraport.train.loop import loss as loss_module
from loraport.train.loop.checkpoints import step_of, whole
from loraport.train.loop.fit import fit
from loraport.train.loop.launch import killed
from loraport.train.loop.settings import Settings, step_down
from loraport.train.loop.trainer import LoraTrainer
from tests.loop import ToyRows, assert_same, base_of, config_for, lora_on, weights_of


class Trouble(TrainerCallback):
    """Calls `begin` with the model before a step; keeps the weights as they are then."""

    def __init__(self, step: int, begin: Any) -> None:
        self.step, self.begin = step, begin
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.weights = weights_of(model)
            self.begin(model)


def train(folder: Path, *callbacks: Any, settings: Settings | None = None, **changes: Any) -> Any:
    """10 steps of 4 rows in 2 epochs; a checkpoint after each second."""
    model = lora_on(base_of("qwen3"))
    rows = ToyRows(18)
    outcome = fit(
        model, rows, ToyRows(4, 1), config_for(**changes), settings or Settings(60), folder, {}, callbacks=callbacks
    )
    return model, outcome


def spoil_gradient(model: Any) -> None:
    weight = [p for p in model.parameters() if p.requires_grad][3]
    weight.register_hook(lambda gradient: gradient * float("inf"))


def spoil_forward(model: Any) -> None:
    model.get_base_model().model.register_forward_hook(
        lambda module, _, output: output.__setitem__("last_hidden_state", output[0] * float("nan"))
    )


@pytest.mark.parametrize(
    ("spoil", "said"), [(spoil_gradient, "the gradient is nan"), (spoil_forward, "the loss is nan")]
)
def test_what_is_not_finite_ends_the_run_before_the_weights_move(spoil: Any, said: str, tmp_path: Path) -> None:
    trouble = Trouble(6, spoil)
    model = lora_on(base_of("qwen3"))
    with pytest.raises(Refused, match=f"diverged: {said} at step 6 of 10") as refused:
        fit(model, ToyRows(18), ToyRows(4, 1), config_for(), Settings(60), tmp_path, {}, callbacks=(trouble,))
    assert "--learning-rate" in refused.value.hint
    assert all(torch.equal(each, trouble.weights[name]) for name, each in weights_of(model).items())
    assert [step_of(path) for path in whole(tmp_path)] == [2, 4]


def test_an_infinite_loss_ends_the_run_though_its_gradient_is_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = loss_module.cross_entropy

    def begin(_: Any) -> None:
        monkeypatch.setattr(loss_module, "cross_entropy", lambda *given: (own(*given)[0] / 0, *own(*given)[1:]))

    with pytest.raises(Refused, match="diverged: the loss is inf at step 3 of 10"):
        train(tmp_path, Trouble(3, begin))
    assert [step_of(path) for path in whole(tmp_path)] == [2]


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    def begin(model: Any) -> None:
        body = model.get_base_model().model
        body.register_forward_hook(
            lambda module, _, output: (
                None if module.training else output.__setitem__("last_hidden_state", output[0] * float("nan"))
            )
        )

    with pytest.raises(Refused, match="diverged: the evaluation loss is nan at step 4 of 10"):
        train(tmp_path, Trouble(4, begin))
    assert [step_of(path) for path in whole(tmp_path)] == [2]


def out_of_memory(model: Any, when: Any) -> None:
    """Let the model run out of memory in training where `when` says so of tokens and calls so far."""
    calls = 0

    def hook(module: Any, _: Any, given: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if module.training and when(given["input_ids"].shape[1], calls):
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")

    model.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    ("when", "ends"),
    [
        (lambda tokens, calls: tokens > 60, Settings(50, 2)),
        (lambda tokens, calls: calls == 2, Settings(200, 1)),  # in the second micro-step of its step
    ],
    ids=["too many tokens", "once within a step"],
)
def test_out_of_memory_it_goes_down_the_ladder_to_the_same_result(
    when: Any, ends: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"settings": Settings(200), "batch_size": 18, "epochs": 4}
    model, outcome = train(tmp_path / "short", Trouble(2, lambda each: out_of_memory(each, when)), **options)
    said = capsys.readouterr().err
    assert outcome.settings == ends
    assert f"out of GPU memory; going on with {ends.words(2)} (the result is the same)" in " ".join(said.split())
    enough, expected = train(tmp_path / "enough", **options)
    assert expected.settings == Settings(200)
    assert "out of GPU memory" not in capsys.readouterr().err
    assert_same(weights_of(model), weights_of(enough), rtol=1e-3, share=1e-4)
    losses = [[entry["loss"] for entry in each.history if "loss" in entry] for each in (outcome, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_at_the_end_of_the_ladder_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"ran out of memory with \d\d tokens at once, 2 of 2 layers .* host memory"
    ) as e:
        train(tmp_path, Trouble(3, lambda model: out_of_memory(model, lambda *_: True)))
    assert "loraport plan train" in e.value.hint
    assert [step_of(path) for path in whole(tmp_path)] == [2]


def test_the_ladder_goes_down_to_one_row_and_the_host() -> None:
    found, settings = [], Settings(100)
    while (lower := step_down(settings, layers=5, longest=30)) is not None:
        found.append(settings := lower)
    assert found == [
        Settings(100, 2),
        Settings(100, 5),
        Settings(50, 5),
        Settings(30, 5),
        Settings(30, 5, True),
    ]


def test_a_process_that_the_kernel_ended_is_told_as_such() -> None:
    died = ProcessExitedException("-9", 1, 4711, -9, "SIGKILL")
    told = killed(died)
    assert told is not None and "the process of GPU 1 was ended by SIGKILL" in told.message
    assert killed(ProcessExitedException("1", 1, 4711, 1)) is None


@pytest.mark.parametrize(("optimizer", "each"), [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2)])
def test_a_rehearsal_keeps_room_for_the_states_that_will_come(optimizer: str, each: int) -> None:
    model = lora_on(base_of("qwen3"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    args = TrainingArguments(optim=optimizer, report_to="none")  # holds an enum, whose str() is in capitals
    trainer: Any = SimpleNamespace(args=args)
    assert LoraTrainer.state_bytes(trainer, model) == each * trained
