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
    for part in ("tuning", "report", "mixture"):
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


def test_texts_are_apart(tmp_path, monkeypatch):
    """Held out by hash: equal documents of the training file leave it together. Tuning documents are cut."""
    monkeypatch.setattr(ladder, "TUNING_TARGETS", 12)
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
        if name == "tuning":
            assert parts == [tokenizer.encode(document)[:12] for document in documents]
        else:
            assert [tokenizer.decode(part) for part in parts] == documents


def test_a_lost_model_is_trained_again(trained, tmp_path):
    """What is kept of a run does not stand in for its model; the same run gives the same bytes."""
    assert (ladder.KEPT / "tiny_seed7/result.json").exists()
    ladder.train("tiny", 7, trained / "data", tmp_path)
    one, other = (base / "runs/tiny_seed7/final_model.int6.ptz" for base in (trained, tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_controls_and_summaries(trained):
    """Without steps all forms score as their plans; steps on another document are steps, but other ones."""
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    slots = ladder.FORMS["slots"][0] | dict(ttt_chunk_size=16)
    other = ladder.OtherDocument(**vars(setup))
    plain, _ = ladder.unadapted(setup, text, slots)
    for which in (setup, other):
        still, _ = ladder.losses(which, text, slots | dict(ttt_lr=0.0))
        np.testing.assert_allclose(still, plain, rtol=0, atol=1e-4)
    own, theirs = (ladder.losses(which, text, slots | dict(ttt_lr=0.01))[0] for which in (setup, other))
    first = text.position < 16  # nothing is learned before a document's first chunk
    for nll in (own, theirs):
        np.testing.assert_allclose(nll[first], plain[first], rtol=0, atol=1e-4)
        assert np.abs(nll - plain)[~first].max() > 0.01
    assert np.abs(own - theirs)[~first].max() > 0.01
    found = ladder.summary(own, 1.0, text)
    assert sum(found["nats_by_position"]) == pytest.approx(own.sum(dtype=np.float64))
    assert sum(found["nats_by_document"]) == pytest.approx(own.sum(dtype=np.float64), abs=0.1)
    assert found["bpb"] == pytest.approx(own.sum(dtype=np.float64) / math.log(2) / text.num_bytes.sum())


def test_steps_on_another_document_are_its_chunks_in_order(trained):
    """As many windows, of the same size, at the same moments; chunk n of the partner in place of chunk n."""
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    config = ladder.replace(setup.config, **ladder.FORMS["slots"][0], ttt_chunk_size=16)
    tokens = np.concatenate([text.tokens, text.tokens[:250], text.tokens[1:200]])  # the last is the longest
    setup = ladder.replace(setup, config=config)
    begin, end = ladder.ev.documents(tokens)
    taken: dict[int, list[int]] = {}
    for own, other in zip(setup.plan(tokens), ladder.OtherDocument(**vars(setup)).plan(tokens), strict=True):
        assert (own.adapted is None) == (other.adapted is None)
        for a, b in zip(own.scored or (), other.scored or (), strict=True):
            np.testing.assert_array_equal(a, b)
        if own.adapted is not None:
            np.testing.assert_array_equal(own.adapted.begin, other.adapted.begin)
            np.testing.assert_array_equal(own.adapted.end, other.adapted.end)
            for start, instead, size in zip(
                own.adapted.start, other.adapted.start, own.adapted.end, strict=True
            ):
                if size:
                    document = int(np.searchsorted(begin, start, side="right")) - 1
                    taken.setdefault(document, []).append(int(instead))
    counts = -(-(end - begin) // 16) - 1
    assert len(taken) == len(begin) and [len(taken[n]) for n in sorted(taken)] == counts.tolist()
    for document, starts in taken.items():
        partner = int(np.searchsorted(begin, starts[0], side="right")) - 1
        offsets = np.arange(len(starts)) * 16 % (16 * counts[partner])
        assert partner != document and starts == (begin[partner] + offsets).tolist()
        assert counts[partner] >= counts[document] or counts[document] == counts.max()


def test_a_longer_context_scales_the_rotary_base(trained, monkeypatch):
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    generator = torch.Generator().manual_seed(0)  # after two steps attention adds nothing yet
    state = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) if "bank" in name else weight
             for name, weight in setup.artifact.state.items()}  # fmt: skip
    setup = ladder.replace(setup, artifact=setup.artifact._replace(state=state))
    bases, score_plan = [], ladder.ev.score_plan

    def watch(setup, tokens):
        bases.append(setup.load().config.rope_base)
        assert setup.config.eval_seq_len == 2 * TINY.length
        return score_plan(setup, tokens)

    monkeypatch.setattr(ladder.ev, "score_plan", watch)
    plain, scaled = (ladder.with_context(setup, text, TINY, 2, flag)[0] for flag in (False, True))
    r = setup.artifact.config.rotary_dims
    assert bases == [10000.0, pytest.approx(10000 * 2 ** (r / (r - 2)))]
    np.testing.assert_array_equal(plain[text.position == 0], scaled[text.position == 0])
    assert np.abs(plain - scaled).max() > 1e-3


def test_measure_keeps_what_it_found_and_goes_on(trained, monkeypatch):
    rates = {form: {"0.01": 1.0, "0.02": 2.0} for form in ladder.FORMS} | {
        "mixture": {"0.5": 1.0, "0.9": 2.0}
    }
    ladder.write_json(ladder.KEPT / "tiny_rates.json", rates)
    path = ladder.KEPT / "tiny_seed7/report.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ladder, "mixed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ladder.measure("tiny", 7, trained / "data", trained, "report")
    before = json.loads(path.read_text())["scores"]
    assert "slots" in before and "mixture" not in before
    before["none"]["seconds"] = 1e6
    ladder.write_json(path, json.loads(path.read_text()) | dict(scores=before))
    assert "gains" in ladder.measure("tiny", 7, trained / "data", trained, "report")
    kept = json.loads(path.read_text())
    assert kept["scores"]["none"]["seconds"] == 1e6
    assert {*kept["scores"]} == {*ladder.UNADAPTED, *ladder.FORMS, "mixture", *ladder.OTHER}
    assert sum(kept["targets_by_position"]) == 1499
    setup, text = ladder.load(trained / "runs/tiny_seed7", trained / "data/report", TINY)
    slots = ladder.FORMS["slots"][0]
    plain, _ = ladder.unadapted(setup, text, slots)
    adapted, _ = ladder.losses(setup, text, slots | dict(ttt_lr=0.01))
    plain, adapted = plain.astype(np.float64), adapted.astype(np.float64)
    half = -logsumexp([-plain, -adapted], axis=0) + math.log(2)
    assert kept["scores"]["mixture"]["bpb"] == pytest.approx(ladder.bpb(half, text), abs=1e-9)
    ladder.measure("tiny", 7, trained / "data", trained, "mixture")
    kept = json.loads(path.with_name("mixture.json").read_text())
    assert {*kept["scores"]} == {*ladder.UNADAPTED, *ladder.FORMS, "mixture"}


def test_tuning_brackets_the_best_rate(trained, monkeypatch):
    """A loss with its least at 6 times the first rate of every form; the nearest half power is 2.5."""

    def curve(setup, text, changes):
        first = next(rate for settings, rate in ladder.FORMS.values() if settings.items() <= changes.items())
        return np.full(len(text.document), 2 + abs(math.log2(changes["ttt_lr"] / first) - 2.6)), 0.0

    (ladder.KEPT / "tiny_rates.json").unlink(missing_ok=True)
    monkeypatch.setattr(ladder, "losses", curve)
    ladder.tune("tiny", trained / "data", trained)
    tried = json.loads((ladder.KEPT / "tiny_rates.json").read_text())
    for form, (_, first) in ladder.FORMS.items():
        assert ladder.best_rate(tried[form]) == f"{first * 2**2.5:.4g}" and len(tried[form]) == 8
    assert ladder.best_rate(tried["mixture"]) in map(str, ladder.MIXED)


def test_a_search_that_finds_nothing_ends():
    found = {}
    ladder.search(1.0, lambda rate: rate, found, lambda: None)  # the lower the better
    assert 2**-11 < float(ladder.best_rate(found)) < 2**-7
    flat = {}
    ladder.search(1.0, lambda rate: math.inf, flat, lambda: None)
    assert len(flat) == 5


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
