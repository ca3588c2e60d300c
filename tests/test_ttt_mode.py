"""TTT_MODE=path.py:Class in the audit: the README's class passes,
cheats are caught, and only scored text is given."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from audit import audit
from test_audit import changed, setup, text  # noqa: F401
from test_ttt_runs import EXAMPLE, plugged

import eval_ttt
import train_gpt
from eval_ttt import evaluate


def test_the_example_passes_the_audit(setup, text, tmp_path):  # noqa: F811
    checks = audit(plugged(setup, EXAMPLE, tmp_path), text, [], whole=np.tile(text, 3))
    found = {check.name.split()[0]: check.ok for check in checks}
    assert not [check for check in checks if check.ok is False]
    assert all(found[name] for name in "T1 T1c T2 T3 T4 T5 T7 T11 T15 T16 T17 T18".split())


CHEATS = {
    "looks ahead by a hook on the model": ("""
import torch
class SignSGD:
    def __init__(self, model, config):
        self.values = {"qo_bank": torch.stack([model.qo_bank.detach().float()] * config.ttt_slots)}
        model.register_forward_hook(self.peek)
    def peek(self, model, args, logits):
        later = torch.nn.functional.one_hot(args[0][:, 1:], logits.size(-1)).to(logits)
        return logits + later.mean(1, keepdim=True)
    reset = lambda self, slots: None
    adapt = lambda self, batch: None
    weights = lambda self: self.values
""", "T1 T2"),
    "keeps what it learned from one evaluation to the next": ("""
import torch
class SignSGD:
    kept = {}
    def __init__(self, model, config):
        self.kept.setdefault("qo_bank", torch.stack([model.qo_bank.detach().float()] * config.ttt_slots))
    def adapt(self, batch):
        for name, gradient in batch.gradients(self.kept).items():
            self.kept[name][batch.slots] -= 0.01 * gradient.sign()
    reset = lambda self, slots: None
    weights = lambda self: self.kept
""", "T11 T16"),
}  # fmt: skip


@pytest.mark.parametrize("source, caught", CHEATS.values(), ids=CHEATS)
def test_a_class_that_cheats_is_caught(source, caught, setup, text, tmp_path):  # noqa: F811
    checks = audit(plugged(setup, source, tmp_path), text, [], whole=np.tile(text, 3))
    failed = {check.name.split()[0] for check in checks if check.ok is False}
    assert failed >= set(caught.split())


def test_a_class_is_given_scored_text_only(setup, tmp_path, monkeypatch):  # noqa: F811
    """Every token of the text is another one, so that a batch shows which targets it holds."""
    tokens = np.arange(2, 202).astype(np.uint16)
    begins = [0, 13, 40, 41, 90, 130]
    tokens[begins] = train_gpt.BOS_ID
    scored, given = set(), []

    class Watching:
        def __init__(self, model, config):
            self.values = {"qo_bank": torch.stack([model.qo_bank.detach().float()] * config.ttt_slots)}

        def reset(self, slots):
            given.append(("reset", slots.tolist()))

        def weights(self):
            return self.values

        def adapt(self, batch):
            seen = {*batch.text[0].flatten().tolist(), *batch.text[1].flatten().tolist()} - {train_gpt.BOS_ID}
            assert seen <= scored, "a token that has not been scored"
            given.append(("adapt", batch.slots.tolist()))

    plugin = eval_ttt.Plugin(Watching, "watching.py", b"")
    each = replace(changed(setup, ttt_mode="watching.py:Watching", ttt_slots=3), plugin=plugin)
    evaluate(each, tokens, lambda model, adaptation, windows, *_: scored.update(
        int(token) for begin, end in windows.ranges() for token in tokens[begin + 1 : end + 1]))  # fmt: skip
    resets = [slot for kind, slots in given[1:] if kind == "reset" for slot in slots]
    assert given[0] == ("reset", [0, 1, 2]) and len(resets) == len(begins)
    assert sum(len(slots) for kind, slots in given if kind == "adapt") > 10


@pytest.mark.parametrize("source, words", [
    ("class Other:\n    pass\n", "SignSGD"),
    ("class SignSGD:\n    reset = weights = print\n", "it has no adapt"),
    ("1 / 0\n", "ZeroDivisionError"), ("class:\n", "SyntaxError"), (None, "No such file"),
])  # fmt: skip
def test_a_class_that_cannot_be_used(source, words, tmp_path, capsys):
    path = tmp_path / "sign.py"
    if source is not None:
        path.write_text(source)
    assert eval_ttt.main([], {"TTT_MODE": f"{path}:SignSGD", "MODEL_PATH": "absent.ptz"}) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: TTT_MODE={path}:SignSGD: ") and words in error and error.count("\n") == 1


def test_the_names_of_the_programs_are_taken(tmp_path):
    path = tmp_path / "eval_ttt.py"
    path.write_text(EXAMPLE)
    with pytest.raises(train_gpt.UserError, match="shipped program"):
        eval_ttt.load_plugin(path, "SignSGD")
