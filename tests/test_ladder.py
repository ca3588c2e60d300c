"""The ladder of sizes: its rungs, its texts, its controls, and what it keeps of a score."""

from __future__ import annotations

import json
import lzma
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.special import logsumexp
from sentencepiece import SentencePieceProcessor
from test_cli import write_shard

import train_gpt

sys.path.append(str(ROOT / "records/ladder"))
import ideas
import ladder

TINY = ladder.Rung(32, 2, 1, seeds=(7,), length=64)


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    """A run of two steps, by the ladder itself, and its texts; what it keeps is beside it."""
    base = tmp_path_factory.mktemp("ladder")
    tokens = train_gpt.open_shard(str(demo_data / "fineweb_val_000000.bin"))[:1500].copy()
    tokens[::250] = train_gpt.BOS_ID
    for part in ("tuning", "report"):
        shutil.copytree(demo_data, base / "data" / part)
        (base / "data" / part / "manifest.json").unlink()
        write_shard(base / "data" / part / "fineweb_val_000000.bin", tokens)
    with pytest.MonkeyPatch.context() as patch:
        for module in (ladder, ideas):
            patch.setattr(module, "KEPT", base / "kept")
        patch.setattr(ladder, "RUNGS", {"tiny": TINY})
        patch.setattr(ladder, "COMPILE", "0")
        patch.setattr(ladder.Rung, "steps", 2)
        ladder.KEPT.mkdir()
        assert "2 steps" in ladder.train("tiny", 7, base / "data", base)
        yield base


def test_parameters_are_those_of_the_banks():
    for rung in ladder.RUNGS.values():
        c, _, _ = train_gpt.load_config({"RECIPE": str(ladder.RECIPE), **rung.settings})
        with torch.device("meta"):
            banks = train_gpt.GPT(c).banks()
        assert rung.parameters == sum(bank.numel() for bank in banks.values())
    assert ladder.RUNGS["0.1M_80"].steps == round(80 * ladder.RUNGS["0.1M_80"].parameters / 4096)


def test_texts_are_apart(tmp_path):
    """Held out by hash: equal documents of the training file leave it together."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = [f"document {n} of many, with a few words {n * n}" for n in range(900)]
    texts = dict(weblab_train=words[:700] + words[:50], weblab_val=words[700:800], weblab_report=words[800:])
    for name, documents in texts.items():
        with lzma.open(corpus / f"{name}.jsonl.xz", "wt") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    shutil.copy(ROOT / "data/demo/tokenizer.model", corpus / "fineweb_1024_bpe.model")
    ladder.make_data(corpus, tmp_path / "data")
    kept, val = (ladder.read_texts(tmp_path / f"data/{name}.jsonl") for name in ("train", "val"))
    mixture = val[100 : 100 + ladder.MIXTURE_DOCUMENTS]
    assert len({*mixture}) == ladder.MIXTURE_DOCUMENTS
    assert not {*mixture} & {*kept} and {*mixture, *kept} == {*words[:700]}
    tokenizer = SentencePieceProcessor(model_file=str(corpus / "fineweb_1024_bpe.model"))
    for name, documents in dict(tuning=words[700:800], mixture=mixture, report=words[800:]).items():
        tokens = train_gpt.open_shard(str(tmp_path / f"data/{name}/fineweb_val_000000.bin")).tolist()
        begins = [n for n, token in enumerate(tokens) if token == train_gpt.BOS_ID]
        parts = [tokens[a + 1 : b] for a, b in zip(begins, [*begins[1:], None], strict=True)]
        assert [tokenizer.decode(part) for part in parts] == documents


def test_controls_and_summaries(trained, monkeypatch):
    """Without steps all forms score as the plan; steps on another document are steps, but other ones."""
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    plain, _ = ladder.losses(setup, text, {}, adapts=False)
    slots = ladder.FORMS["slots"][0]
    still, _ = ladder.losses(setup, text, slots | dict(ttt_lr=0.0), trainer=ladder.OtherDocument)
    np.testing.assert_allclose(still, plain, rtol=0, atol=1e-4)
    own, same, other = (ladder.losses(setup, text, slots | dict(ttt_lr=0.01), trainer=trainer)[0]
                        for trainer in (None, ladder.Slots, ladder.OtherDocument))  # fmt: skip
    np.testing.assert_allclose(own, same, rtol=0, atol=1e-4)  # order of the generated text's batches
    first = text.position < setup.config.ttt_chunk_size  # nothing is learned before a document's first chunk
    for nll in (own, other):
        np.testing.assert_allclose(nll[first], plain[first], rtol=0, atol=1e-4)
        assert np.abs(nll - plain)[~first].max() > 0.01
    assert np.abs(own - other)[~first].max() > 0.01
    found = ladder.summary(own, 1.0, text)
    assert sum(found["nats_by_position"]) == pytest.approx(own.sum(dtype=np.float64))
    assert sum(found["nats_by_document"]) == pytest.approx(own.sum(dtype=np.float64), abs=0.1)
    assert found["bpb"] == pytest.approx(own.sum(dtype=np.float64) / math.log(2) / text.num_bytes.sum())


def test_other_document_never_takes_its_own(trained, monkeypatch):
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    drawn, adapt = [], ladder.ev.TestTimeTrainer.adapt

    def watch(self, batch):
        count = len(batch.slots)
        drawn.extend(zip(self.documents[batch.slots.numpy()].tolist(), batch.text.targets[:count].tolist(),
                         batch.text.loss_weight[:count].gt(0).sum(1).tolist(), strict=True))  # fmt: skip
        assert not batch.text.loss_weight[count:].any()
        adapt(self, batch)

    monkeypatch.setattr(ladder.ev.TestTimeTrainer, "adapt", watch)
    form = ladder.FORMS["slots"][0] | dict(ttt_lr=1e-3)
    ladder.losses(setup, text, form, trainer=ladder.OtherDocument)
    begin, end = ladder.ev.documents(text.tokens)
    own = {n: text.tokens[a : b + 1].tolist() for n, (a, b) in enumerate(zip(begin, end, strict=True))}
    assert len(drawn) > 10

    def inside(part: list[int], whole: list[int]) -> bool:
        return any(whole[i : i + len(part)] == part for i in range(len(whole)))

    for document, targets, length in drawn:
        assert not inside(targets[:length], own[document])
        assert any(inside(targets[:length], each) for n, each in own.items() if n != document)


def test_measure_keeps_what_it_found(trained):
    ladder.tg.write_atomically(ladder.KEPT / "tiny_rates.json", json.dumps(
        {form: {"0.01": 1.0, "0.02": 2.0} for form in ladder.FORMS}).encode())  # fmt: skip
    assert "gains" in ladder.measure("tiny", 7, trained / "data", trained, "report")
    kept = json.loads((ladder.KEPT / "tiny_seed7/report.json").read_text())
    assert kept["rates"] == dict.fromkeys([*ladder.FORMS, "another document"], 0.01)
    assert sum(kept["targets_by_position"]) == 1499
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    plain, adapted = (ladder.losses(setup, text, changes, adapts)[0].astype(np.float64) for changes, adapts in
                      (({}, False), (ladder.FORMS["slots"][0] | dict(ttt_lr=0.01), True)))  # fmt: skip
    half = -logsumexp([-plain, -adapted], axis=0) + math.log(2)
    assert kept["scores"]["slots, 0.5 of the mixture"]["bpb"] == pytest.approx(
        ladder.bpb(half, text), abs=1e-9
    )


def test_tuning_brackets_the_best_rate(trained, monkeypatch):
    """A loss with its least at 8 times the first rate of every form."""

    def curve(setup, text, changes, adapts=True):
        first = next(rate for settings, rate in ladder.FORMS.values() if settings.items() <= changes.items())
        return np.full(len(text.document), 2 + abs(math.log2(changes["ttt_lr"] / first) - 3)), 0.0

    (ladder.KEPT / "tiny_rates.json").unlink(missing_ok=True)
    monkeypatch.setattr(ladder, "losses", curve)
    ladder.tune("tiny", trained / "data", trained)
    tried = json.loads((ladder.KEPT / "tiny_rates.json").read_text())
    for form, (_, first) in ladder.FORMS.items():
        assert ladder.best_rate(tried[form]) == f"{8 * first:.4g}" and len(tried[form]) == 6


def test_chunks_by_position_cover_each_document_once(trained):
    """Small chunks first; sizes of a chunk everywhere give the plan of the evaluator."""
    assert ideas.chunk_starts(((8, 20), (16, 60)), 64, 150).tolist() == [0, 8, 16, 24, 40, 56, 72, 136, 200]
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    setup = ladder.replace(setup, config=ladder.replace(setup.config, **ladder.FORMS["slots"][0]))
    same = ideas.BySizes(**vars(setup), sizes=((64, 1 << 20),)).plan(text.tokens)
    for ours, theirs in zip(same, setup.plan(text.tokens), strict=True):
        for a, b in (
            (ours.scored, theirs.scored),
            (ours.adapted, theirs.adapted),
            (ours.slots, theirs.slots),
        ):
            assert (a is None) == (b is None)
            for left, right in zip(a or (), b or (), strict=True):
                np.testing.assert_array_equal(left, right)
    plan = ideas.BySizes(**vars(setup), sizes=((8, 20), (16, 60))).plan(text.tokens)
    covered = np.zeros(len(text.document), int)
    for chunk in plan:
        for begin, end in chunk.scored.ranges():
            covered[begin:end] += 1
            at = text.position[begin]
            assert end - begin <= (8 if at < 20 else 16 if at < 60 else 64)
    assert (covered == 1).all()


def test_twice_takes_two_steps_on_the_first_chunks_only(trained):
    """Two steps on no chunk are `slots`; those on the first change what follows it and nothing in it."""
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    form = ladder.FORMS["slots"][0] | dict(ttt_lr=0.01)
    once, _ = ladder.losses(setup, text, form)
    nll = {
        n: ladder.losses(setup, text, form, trainer=ladder.partial(ideas.TwoSteps, twice=n))[0]
        for n in (0, 1, 2)
    }
    np.testing.assert_allclose(nll[0], once, rtol=0, atol=1e-4)
    size = setup.config.ttt_chunk_size
    for fewer, more, first in ((0, 1, size), (1, 2, 2 * size)):
        moved = np.abs(nll[more] - nll[fewer])
        # the second moments are those of all slots, so that other documents' steps move a little, too
        assert moved[text.position < size].max() < 1e-4
        assert moved[text.position >= first].max() > 1e-3


def test_ideas_are_chosen_by_kind(trained):
    for n, name in enumerate(ideas.IDEAS):
        ladder.write_json(ideas.rates_file(name), {"0.01": 3.0 - n / 10, "0.02": 4.0})
    ideas_kept = ideas.chosen()
    assert ideas_kept == sorted(["slots", "8 to 48, 24 to 192, 48", "twice on 4"])
