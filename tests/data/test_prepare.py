import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from disk import file_size_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_jax.config import ConfigError, DataConfig, DedupConfig, SourceConfig
from dsv2_jax.data import prepare as module
from dsv2_jax.data.prepare import SPLITS, prepare, shard_path
from dsv2_jax.data.sources import DataError
from dsv2_jax.data.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
VOCAB, SHARDS = 280, 4


def line(i):
    return f"Document number {i} speaks of {i * i} things, of the {i}th day and of 你好 {i % 7}.\n"


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config_of(*paths, **fields):
    sources = tuple(SourceConfig(f"s{i}", (str(path),)) for i, path in enumerate(paths))
    return DataConfig(sources, **{"virtual_shards": SHARDS, "held_out_share": 0.2, **fields})


def run(config, out, vocab_size=VOCAB):
    return prepare(config, out, vocab_size, progress=False)


def documents(out, source, split, shards=SHARDS):
    """Ids of the documents in the order they were written: document i is in file i % shards."""
    files = []
    for shard in range(shards):
        reader = ArrayRecordReader(str(shard_path(out, source, split, shard, shards)))
        records = reader.read_all() if reader.num_records() else []
        files.append([np.frombuffer(record, "<u4").tolist() for record in records])
    total = sum(map(len, files))
    return [files[i % shards][i // shards] for i in range(total)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "a.jsonl", map(line, range(300)))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    return out, run(config_of(corpus), out)


def test_every_document_is_there_once_in_order_framed_by_bos_and_eos(prepared):
    out, manifest = prepared
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert (manifest["bos"], manifest["eos"]) == (tokenizer.bos, tokenizer.eos)
    assert manifest["vocab_size"] == tokenizer.vocab_size == VOCAB
    decoded = {}
    for split in SPLITS:
        found = documents(out, "s0", split)
        decoded[split] = [tokenizer.decode(ids) for ids in found]
        assert found == [tokenizer.encode_document(text) for text in decoded[split]]
        counts = manifest["sources"]["s0"][split]
        expected = {"documents": len(found), "tokens": sum(map(len, found)),
                    "bytes": sum(len(text.encode()) for text in decoded[split])}  # fmt: skip
        assert counts == expected
    assert Counter(decoded["train"] + decoded["held_out"]) == Counter(map(line, range(300)))
    held_out = [int(text.split()[2]) for text in decoded["held_out"]]
    train = [int(text.split()[2]) for text in decoded["train"]]
    assert held_out == sorted(held_out)
    assert sum(a > b for a, b in itertools.pairwise(train)) <= 1  # the one kept back until another was held out
    assert 30 < len(decoded["held_out"]) < 95  # 60 +- 4.5 standard deviations
    entry = manifest["sources"]["s0"]
    assert (entry["read"], entry["removed"], entry["malformed"], entry["malformed_count"]) == (300, {}, [], 0)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert not list(out.parent.glob("*.partial"))


def test_unigram_bits_per_byte(prepared):
    out, manifest = prepared
    train = [i for ids in documents(out, "s0", "train") for i in ids if i != manifest["bos"]]
    held_out = [i for ids in documents(out, "s0", "held_out") for i in ids if i != manifest["bos"]]
    counts = Counter(train)
    denominator = len(train) + manifest["vocab_size"] - 1  # BOS is never predicted
    bits = -sum(np.log2((counts[i] + 1) / denominator) for i in held_out)
    expected = bits / manifest["sources"]["s0"]["held_out"]["bytes"]
    assert manifest["unigram_held_out_bits_per_byte"] == pytest.approx(expected, rel=1e-12)
    assert 0.5 < expected < 8


def test_again_is_equal_and_a_finished_folder_is_reused(corpus, prepared, tmp_path, monkeypatch):
    out, manifest = prepared
    again = run(config_of(corpus), tmp_path / "again")
    assert again == manifest
    for split in SPLITS:
        assert documents(tmp_path / "again", "s0", split) == documents(out, "s0", split)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    monkeypatch.setattr(module, "_prepare", None)
    assert run(config_of(corpus), out) == manifest
    changed = dataclasses.replace(config_of(corpus), workers=3, seed=7)  # how it is read, not what is read
    assert run(changed, out) == manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"held_out_share": 0.1}, "held_out_share: 0.2 there, 0.1 now"),
        ({"virtual_shards": 8}, "virtual_shards: 4 there, 8 now"),
        ({"quality_filters": ("c4_sentences",)}, r"quality_filters: \[\] there, \['c4_sentences'\] now"),
        ({"malformed_share": 0.5}, "malformed_share"),
        ({"dedup": DedupConfig()}, "dedup: None there"),
        ({"tokenizer": "tokenizer.json"}, "tokenizer: None there"),
        ({"blocked_terms": "manifest.json"}, "blocked_terms: None there"),
    ],
)
def test_other_settings_are_refused_by_name(corpus, prepared, change, named):
    out, _ = prepared
    for field in ("tokenizer", "blocked_terms"):
        if field in change:
            change = {field: str(out / change[field])}
    with pytest.raises(ConfigError, match=f"{named}.*remove it, or choose another folder"):
        run(config_of(corpus, **change), out)


def test_changed_files_are_noticed(corpus, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_bytes(corpus.read_bytes())
    out = tmp_path / "out"
    run(config_of(path), out)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"source s0: .*'files': 1.*now"):
        run(config_of(path), out)
    with pytest.raises(ConfigError, match="vocab_size: 280 there, 281 now"):
        run(config_of(path), out, 281)
    source = SourceConfig("other", (str(path),))
    with pytest.raises(ConfigError, match=r"sources: \['s0'\] there, \['other'\] now"):
        run(dataclasses.replace(config_of(path), sources=(source,)), out)


def test_folders_that_are_not_whole_are_refused(corpus, tmp_path):
    out = tmp_path / "out"
    run(config_of(corpus), out)
    lost = shard_path(out, "s0", "train", 2, SHARDS)
    lost.rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match=f"{lost.name}: missing"):
        run(config_of(corpus), out)
    (tmp_path / "kept").rename(lost)
    manifest = (out / "manifest.json").read_text()
    for damage in ("", manifest[: len(manifest) // 2], "[]", '{"settings": {}, "sources": {}}'):
        (out / "manifest.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"manifest\.json: missing or damaged"):
            run(config_of(corpus), out)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json: missing or damaged"):
        run(config_of(corpus), out)
    assert lost.exists(), "what the user has there is never removed"
    (tmp_path / "empty").mkdir()
    run(config_of(corpus), tmp_path / "empty")


@pytest.mark.parametrize("step", ["write", "manifest", "replace"])
def test_a_failure_at_any_step_leaves_nothing_accepted(corpus, prepared, tmp_path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        target = {"write": (module._Shards, "write"), "manifest": (module, "unigram_bits"), "replace": (os, "replace")}
        patch.setattr(*target[step], fail)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(corpus), out)
    assert not out.exists()
    (tmp_path / "out.partial" / "leftover").write_text("of the failed run")
    assert run(config_of(corpus), out) == prepared[1]
    assert not (out / "leftover").exists()


def test_a_killed_process_leaves_nothing_accepted(corpus, prepared, tmp_path):
    """SIGKILL once the first shards exist; the next start gives what an undisturbed one gives."""
    out = tmp_path / "out"
    script = f"""
import time
from dsv2_jax.config import DataConfig, SourceConfig
from dsv2_jax.data import prepare as module
write = module._Shards.write
def slow(self, batch):
    write(self, batch)
    time.sleep(600)
module._Shards.write = slow
source = SourceConfig("s0", ({str(corpus)!r},))
config = DataConfig((source,), virtual_shards={SHARDS}, held_out_share=0.2)
module.prepare(config, {str(out)!r}, {VOCAB}, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    try:
        first = shard_path(tmp_path / "out.partial", "s0", "train", 0, SHARDS)
        while not first.exists() and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert first.exists()
    assert not out.exists()
    assert run(config_of(corpus), out) == prepared[1]


def test_what_filters_take_out_is_counted_by_rule(tmp_path):
    good = [
        f"{line(i).strip()} It has a second sentence in it, too.\nAnd a third one is on line {i}.\n" for i in range(60)
    ]
    bad = ["{ One. Two. Three. }", "   \n", "Only one sentence is in this text.", "", good[3].upper(), good[4],
           good[5].replace("second", "2nd"), "One is forbidden here. Two too. Three."]  # fmt: skip
    menu = "Home\nAbout us\n" + good[0].replace("second", "first").replace("0", "99")
    path = write_jsonl(tmp_path / "a.jsonl", [*good, *bad, menu])
    (tmp_path / "terms.txt").write_text("Forbidden\n")
    rules = ("c4_sentences", "c4_curly_bracket", "c4_unpunctuated_lines")
    config = config_of(path, quality_filters=rules, blocked_terms=str(tmp_path / "terms.txt"),
                       dedup=DedupConfig(threshold=0.78, ngram=2))  # fmt: skip
    out = tmp_path / "out"
    entry = run(config, out)["sources"]["s0"]
    removed = dict(entry["removed"])
    assert removed.pop("c4_unpunctuated_lines") == 3  # lines: the bracket's, and two of the menu
    assert removed["exact_duplicate"] == 2
    assert removed["near_duplicate"] == 1
    assert removed["blocked_terms"] == 1
    assert removed["c4_sentences"] == 1
    assert removed["empty"] == 3  # two that came empty, one that was left empty
    kept = entry["train"]["documents"] + entry["held_out"]["documents"]
    assert entry["read"] == 69 == kept + sum(removed.values())
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    texts = [tokenizer.decode(ids) for split in SPLITS for ids in documents(out, "s0", split)]
    assert good[0] in texts
    assert not any("forbidden" in text or "Home" in text for text in texts)
    plain = run(config_of(path), tmp_path / "plain")["sources"]["s0"]
    assert plain["removed"] == {"empty": 2}


def test_duplicates_across_sources_go_and_copies_share_a_split(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", map(line, range(80)))
    b = write_jsonl(tmp_path / "b.jsonl", [*map(line, range(40)), *map(line, range(200, 240))])
    manifest = run(config_of(a, b, dedup=DedupConfig(threshold=0.99)), tmp_path / "out")
    assert manifest["sources"]["s0"]["removed"] == {}
    assert manifest["sources"]["s1"]["removed"] == {"exact_duplicate": 40}
    run(config_of(a, b), tmp_path / "twice")
    sides = [
        {tuple(ids) for name in ("s0", "s1") for ids in documents(tmp_path / "twice", name, split)} for split in SPLITS
    ]
    assert not sides[0] & sides[1]


def test_malformed_records_are_listed_and_too_many_stop(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": line(i)}) for i in range(50)]
    rows[7], rows[30] = "{", '{"other": 1}'
    path.write_text("\n".join(rows))
    entry = run(config_of(path, malformed_share=0.04), tmp_path / "out")["sources"]["s0"]
    assert (entry["malformed_count"], entry["read"]) == (2, 50)
    assert [item["where"] for item in entry["malformed"]] == [f"{path}:8", f"{path}:31"]
    said = capsys.readouterr().out
    assert f"source 's0': 2 of 50 records are malformed and left out, {path}:8 the first (not JSON: " in said
    assert f"{tmp_path / 'out' / 'manifest.json'} lists the first 100" in said
    with pytest.raises(DataError, match=r"(?s)2 of 50 records.*share=0.03.*a\.jsonl:8: .*a\.jsonl:31: no field"):
        run(config_of(path, malformed_share=0.03), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    path.write_text("{\n" * 5000 + "\n".join(rows))
    with pytest.raises(DataError, match=r"101 of 101 records \(about \d{4} in all\)"):  # not read to the end
        run(config_of(path), tmp_path / "other")


def test_malformed_records_at_the_head_of_many_good_ones_do_not_stop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 150 + "".join(f'{{"text": "good one {i}"}}\n' for i in range(20_000)))
    entry = run(config_of(path, malformed_share=0.01), tmp_path / "out")["sources"]["s0"]
    assert (entry["malformed_count"], entry["read"], len(entry["malformed"])) == (150, 20_150, 100)


def test_four_formats_give_the_same_documents(tmp_path):
    texts = [line(i) for i in range(40)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i:03d}.txt").write_text(text)
    write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    paths = [tmp_path / "text" / "*", *(tmp_path / f"a.{kind}" for kind in ("jsonl", "parquet", "arrayrecord"))]
    manifest = run(config_of(*paths), tmp_path / "out")
    for split in SPLITS:
        found = [documents(tmp_path / "out", f"s{i}", split) for i in range(4)]
        assert found[0] == found[1] == found[2] == found[3]
        assert len(found[0]) == manifest["sources"]["s0"][split]["documents"] > 0


def test_a_given_tokenizer_is_used_and_must_fit_the_model(corpus, prepared, tmp_path):
    path = prepared[0] / "tokenizer.json"
    manifest = run(config_of(corpus, tokenizer=str(path)), tmp_path / "out", 5000)
    assert manifest["vocab_size"] == VOCAB
    assert documents(tmp_path / "out", "s0", "train") == documents(prepared[0], "s0", "train")
    with pytest.raises(ConfigError, match=r"DataConfig.tokenizer=.*vocab_size=279 ids; this one has 280"):
        run(config_of(corpus, tokenizer=str(path)), tmp_path / "other", 279)
    with pytest.raises(ConfigError, match=r"DataConfig\.tokenizer='absent\.json'"):
        run(config_of(corpus, tokenizer="absent.json"), tmp_path / "other")


def test_the_tokenizer_never_sees_held_out_text(corpus, monkeypatch):
    clean = module._Cleaner(config_of(corpus))
    sample = list(module._sample(config_of(corpus), clean))
    split = dict.fromkeys(SPLITS, ())
    for side, text in module._split(map(line, range(300)), 0.2):
        split[side] += (text,)
    assert sorted(sample) == sorted(split["train"])
    monkeypatch.setattr(module, "TOKENIZER_SAMPLE_BYTES", corpus.stat().st_size // 4)
    strided = list(module._sample(config_of(corpus, corpus), clean))
    assert 300 * 2 * 0.8 / 8 / 1.5 < len(strided) < 300 * 2 * 0.8 / 8 * 1.5
    assert set(strided) < set(split["train"])
    assert max(int(text.split()[2]) for text in strided) > 200  # spread over the files, not their beginning


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(max_size=4), max_size=30), st.sampled_from([1e-6, 0.1, 0.5]))
def test_split_keeps_every_document_and_holds_some_out(texts, share):
    pairs = list(module._split(iter(texts), share))
    assert Counter(text for _, text in pairs) == Counter(texts)
    held_out = [text for side, text in pairs if side == "held_out"]
    low = [text for text in texts if module._held_out_rank(text) < share]
    assert held_out == low if low else len(held_out) == min(1, len(texts))
    assert low or held_out == [min(texts, key=module._held_out_rank)][: len(held_out)] if texts else not pairs


def test_a_source_too_small_to_split_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["One document."])
    with pytest.raises(DataError, match=r"source 's0': no train document .*1 records.*give it more text"):
        run(config_of(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_documents_for_the_shards_say_so_and_leave_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", map(line, range(6)))
    with pytest.raises(ConfigError, match=r"\.virtual_shards=16: must be at most [45], the training documents"):
        run(config_of(path, virtual_shards=16), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(config_of(path), tmp_path / "out")


def test_a_full_disk_is_a_data_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", map(line, range(3000)))
    with file_size_limit(20_000), pytest.raises(DataError, match=r"out: preparing failed \(.*make room, and start"):
        run(config_of(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_standard_library(tmp_path):
    """The default corpus, a part of it: whole files, in order, the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        files = module.expand(SourceConfig("python", ("stdlib",)))
        patch.setattr("dsv2_jax.data.sources.stdlib_files", lambda: files[:60])
        config = DataConfig((SourceConfig("python", ("stdlib",)),))
        manifest = prepare(config, tmp_path / "a", 512, progress=False)
        assert prepare(config, tmp_path / "b", 512, progress=False) == manifest
    entry = manifest["sources"]["python"]
    assert entry["read"] == sum(file.stat().st_size > 0 for file in files[:60])
    assert entry["train"]["bytes"] + entry["held_out"]["bytes"] <= sum(file.stat().st_size for file in files[:60])
    tokenizer = Tokenizer.load(tmp_path / "a" / "tokenizer.json")
    texts = {file.read_bytes().decode() for file in files[:60]}
    assert all(tokenizer.decode(ids) in texts for ids in documents(tmp_path / "a", "python", "held_out", 16))


def test_real_text(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    sources = (
        SourceConfig("play", (str(SHARED / "tinyshakespeare.txt"),)),
        SourceConfig("maths", (str(SHARED / "gsm8k_test.jsonl"),), text_field="question"),
        SourceConfig("chinese", (str(SHARED / "cmrc2018_trial.json"),)),
    )
    config = DataConfig(sources, dedup=DedupConfig(permutations=64))
    manifest = prepare(config, tmp_path / "out", 512, progress=False)
    entries = manifest["sources"]
    play = entries["play"]
    assert play["train"]["bytes"] + play["held_out"]["bytes"] == (SHARED / "tinyshakespeare.txt").stat().st_size
    assert play["train"]["documents"] >= 16  # some for every virtual shard
    assert all(entry["malformed_count"] == 0 for entry in entries.values())
    assert all(entry[split]["documents"] > 0 for entry in entries.values() for split in SPLITS)
    assert 1.5 < manifest["unigram_held_out_bits_per_byte"] < 5
