"""Exports as folders for Hugging Face: loaded without this package, pushed, fetched, and made exports again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bd3_ds
from bd3_ds.commands import convert as convert_command
from bd3_ds.commands import sample as sample_command
from bd3_ds.data.tokenizer import load_tokenizer, number_tokenizer
from bd3_ds.interop.init_from import find_start
from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from tests.helpers.hub_reader import LOGITS, TOKENIZER, reader
from tests.helpers.hub_stand_in import Hub, hub_stand_in
from tests.helpers.tiny import tiny_export, tiny_run, tiny_text
from tests.unit.interop.test_starting_weights import causal_model

ROOT = Path(__file__).resolve().parents[3]
KINDS = {
    "bd3": ("objective.block_schedule={0: [16], 1: [4, 8]}", "eval.sets={}", "data.mix={a: 0.25}"),
    "mdlm": ("objective.name=mdlm", "objective.block_size=null"),
    "sedd": ("objective.name=sedd", "objective.block_size=null", "eval.estimator=mc"),
    "ar": ("objective.name=ar", "objective.block_size=null", "model.vocab_multiple=8"),
    "ar_tied": ("objective.name=ar", "objective.block_size=null", "model.tie_embeddings=true"),
    "bd3_llama": (
        *("model.norm=rmsnorm", "model.mlp=swiglu", "model.heads=4", "model.kv_heads=2", "model.biases=[qkv,head]"),
        *("model.tie_embeddings=true", "model.positions=learned", "model.max_positions=20"),
    ),
}


def convert(*words: object) -> None:
    assert convert_command.main([str(word) for word in words]) == 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of each kind, and beside it (as `folder`) what --to hf made of it."""
    made = {}
    for kind, words in KINDS.items():
        path = tmp_path_factory.mktemp(kind)
        made[kind] = tiny_export(tiny_run(path, *words))
        convert("--from", "export", "--to", "hf", made[kind], path / kind)
    return made


def folder(exports: dict[str, Path], kind: str) -> Path:
    return exports[kind].parents[2] / kind


def logits(export: Path) -> torch.Tensor:
    """The export's own, for `inputs`."""
    model = bd3_ds.load(str(export))
    given = inputs(model)
    return model.logits(given["input_ids"], given.get("clean_ids"), given.get("sigma"))


def task(name: Path | str, export: Path) -> list[object]:
    """What the reader is to load by `name` and to compute."""
    model = bd3_ds.load(str(export))
    auto = "AutoModelForCausalLM" if model.run.objective.name == "ar" else "AutoModelForMaskedLM"
    return [str(name), {key: value.tolist() for key, value in inputs(model).items()}, auto]


def inputs(model: bd3_ds.LanguageModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randint(0, model.vocab_size - 1, (2, 16), generator=generator)
    given = {"input_ids": x0}
    if model.run.objective.name != "ar":
        given["input_ids"] = torch.where(torch.rand(2, 16, generator=generator) < 0.5, model.mask_id, x0)
    if model.run.objective.name == "bd3":
        given["clean_ids"] = x0
    if model.run.objective.name == "sedd":
        given["sigma"] = torch.tensor([0.3, 2.0])
    return given


@pytest.fixture(scope="module")
def seen(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one reader without the package made of all folders, and of one that was loaded and saved with it."""
    from transformers import AutoModelForMaskedLM

    import bd3_ds.hub  # noqa: F401

    path = tmp_path_factory.mktemp("seen")
    AutoModelForMaskedLM.from_pretrained(folder(exports, "bd3")).save_pretrained(path / "again")
    tasks = [task(path / "again", exports["bd3"])]
    tasks += [task(folder(exports, kind), export) for kind, export in exports.items()]
    (path / "tasks.json").write_text(json.dumps(tasks))
    (path / "texts.json").write_text(json.dumps(tiny_text()))
    words = (str(path / "tasks.json"), str(folder(exports, "bd3")), str(path / "texts.json"))
    (path / "said.json").write_text(reader(path, LOGITS + TOKENIZER, *words))
    return path


def test_readers_without_the_package_get_the_same_logits(exports: dict[str, Path], seen: Path) -> None:
    for kind, export in exports.items():
        expected = logits(export)
        assert expected.std() > 0.1 and not torch.equal(expected[0], expected[1])
        found = torch.load(f"{folder(exports, kind)}.pt")
        assert len(found) == 2
        for name, value in found.items():
            assert torch.equal(value, expected), (kind, name)
    assert torch.equal(torch.load(seen / "again.pt")["AutoModel"], logits(exports["bd3"]))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_to_the_bit(exports: dict[str, Path], tmp_path: Path, kind: str) -> None:
    convert("--from", "hf", folder(exports, kind), tmp_path / "back")
    assert content(tmp_path / "back") == content(exports[kind])
    assert {"config.yaml", "export.json", "model.safetensors", "tokenizer/tokenizer.model"} == set(
        content(tmp_path / "back")
    )
    assert bd3_ds.load(str(tmp_path / "back")).run == bd3_ds.load(str(exports[kind])).run


def test_the_code_is_the_package_s_own(exports: dict[str, Path]) -> None:
    """Flat files that name no package of ours, equal to their origin but for that."""
    files = {path.name: path.read_text() for path in folder(exports, "bd3").glob("*.py")}
    rooms = ("interop", "model", "model/attention", "model/attention/backends", "config", "runtime")
    assert {"modeling_bd3_ds.py", "dit.py", "layers.py", "masks.py", "dit_config.py"} <= set(files)
    for name, text in files.items():
        assert "from bd3_ds" not in text and "import bd3_ds" not in text
        (origin,) = (path for room in rooms for path in (ROOT / "bd3_ds" / room).glob(name))
        unlike = [
            (ours, theirs)
            for ours, theirs in zip(origin.read_text().splitlines(), text.splitlines(), strict=False)
            if ours != theirs
        ]
        assert all(ours.lstrip().startswith("from bd3_ds.") for ours, _ in unlike)


def test_registered_classes_need_no_remote_code(exports: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    import bd3_ds.hub as hub

    model = AutoModel.from_pretrained(folder(exports, "bd3"))
    assert type(model) is hub.BD3Model
    given = inputs(bd3_ds.load(str(exports["bd3"])))
    with torch.no_grad():
        assert torch.equal(model(**given).logits, logits(exports["bd3"]))
    with pytest.raises(ValueError, match="load it with AutoModelForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(folder(exports, "bd3"))
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        AutoModelForMaskedLM.from_pretrained(folder(exports, "ar"))
    with pytest.raises(ValueError, match="clean_ids must be"):
        model(given["input_ids"])
    with pytest.raises(ValueError, match=r"sigma \[B\] is needed by sedd"):
        model(**given, sigma=torch.ones(2))


def test_what_transformers_saves_comes_back(exports: dict[str, Path], tmp_path: Path) -> None:
    """In shards, and with a weight changed as by training there."""
    import bd3_ds.hub as hub

    model = hub.BD3ForMaskedLM.from_pretrained(folder(exports, "bd3_llama"))
    model.save_pretrained(tmp_path / "same", max_shard_size="20KB")
    assert len(list((tmp_path / "same").glob("*.safetensors"))) > 1
    convert("--from", "hf", tmp_path / "same", tmp_path / "back")
    files, expected = content(tmp_path / "back"), content(exports["bd3_llama"])
    assert files == {name: expected[name] for name in files} and "model.safetensors" in files
    with torch.no_grad():
        model.network.embed.weight += 1.0
    model.save_pretrained(tmp_path / "trained")
    convert("--from", "hf", tmp_path / "trained", tmp_path / "new")
    before, after = (load_file(path / "model.safetensors") for path in (exports["bd3_llama"], tmp_path / "new"))
    assert torch.equal(after["embed.weight"], before["embed.weight"] + 1.0) and before.keys() == after.keys()


def test_causal_models_have_a_loss_and_generate(exports: dict[str, Path]) -> None:
    import bd3_ds.hub as hub

    ours = bd3_ds.load(str(exports["ar"]))
    model = hub.BD3ForCausalLM.from_pretrained(folder(exports, "ar"))
    text = inputs(ours)["input_ids"]
    with torch.no_grad():
        loss = model(text, labels=text).loss
    nelbo = ours.score(text).nelbo
    torch.testing.assert_close(loss.double(), nelbo.sum() / (2 * 15), rtol=1e-5, atol=1e-6)
    written = model.generate(text[:, :4], max_length=16, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(written, ours.sample(2, 16, text[:, :4], temperature=0.0).tokens)
    # Padding on the left moves rotary positions alike, and is not seen.
    padded = torch.cat([torch.full((2, 3), 7), text[:, :8]], dim=1)
    with torch.no_grad():
        hidden = model(padded, attention_mask=(torch.arange(11) >= 3).long().expand(2, -1)).logits[:, 3:]
        torch.testing.assert_close(hidden, model(text[:, :8]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bd3", "mdlm", "sedd"])
def test_labels_are_not_ignored(exports: dict[str, Path], kind: str) -> None:
    import bd3_ds.hub as hub

    model = hub.BD3ForMaskedLM.from_pretrained(folder(exports, kind))
    given = inputs(bd3_ds.load(str(exports[kind])))
    with pytest.raises(
        ValueError, match=rf"labels: no loss .* that of {kind} depends on .*score\(texts\) gives the bound"
    ):
        model(**given, labels=given["input_ids"])
    causal = hub.BD3Model.from_pretrained(folder(exports, "ar"))
    with pytest.raises(ValueError, match="load this model with AutoModelForCausalLM for a loss"):
        causal(given["input_ids"], labels=given["input_ids"])


@pytest.mark.parametrize("kind", ["bd3", "ar"])
def test_nothing_is_ignored_silently(exports: dict[str, Path], kind: str) -> None:
    """What callers of transformers pass along by default is taken; what they would miss is refused by its name."""
    import bd3_ds.hub as hub

    kinds = hub.BD3ForCausalLM if kind == "ar" else hub.BD3ForMaskedLM
    model = kinds.from_pretrained(folder(exports, kind))
    given = inputs(bd3_ds.load(str(exports[kind])))
    plain = {"output_hidden_states": False, "past_key_values": None, "inputs_embeds": None, "use_cache": False}
    with torch.no_grad():
        logits = model(**given).logits
        assert torch.equal(model(**given, **plain, token_type_ids=torch.zeros(2, 16)).logits, logits)
        (alone,) = model(**given, return_dict=False)
        assert torch.equal(alone, logits)
    for name, value in (
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("past_key_values", object()),
        ("inputs_embeds", torch.zeros(2, 16, 32)),
        ("position_ids", torch.arange(16)),
        ("use_cache", True),
        ("sigmas", torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: not taken by this model"):
            model(**given, **{name: value})
    with pytest.raises(ValueError, match="token_type_ids other than 0"):
        model(**given, token_type_ids=torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 4\]; it must be \[2, 16\]"):
        model(**given, attention_mask=torch.ones(2, 4))
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(90\): this model has 81 tokens, \[MASK\] at 80"):
        model.resize_token_embeddings(90)


def test_a_tokenized_text_goes_straight_into_generate(exports: dict[str, Path]) -> None:
    import transformers

    import bd3_ds.hub as hub

    model = hub.BD3ForCausalLM.from_pretrained(folder(exports, "ar"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(exports, "ar"))
    assert tokenizer.model_max_length == 16
    text = tokenizer("the", return_tensors="pt", add_special_tokens=False)
    written = model.generate(**text, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape[1] == text["input_ids"].shape[1] + 4
    # A folder of an earlier version gives token types as well.
    typed = {**text, "token_type_ids": torch.zeros_like(text["input_ids"])}
    assert torch.equal(model.generate(**typed, max_new_tokens=4, do_sample=False, eos_token_id=None), written)


def test_the_readme_s_lines_for_transformers_work_as_printed(exports: dict[str, Path], tmp_path: Path) -> None:
    """Beside a torch of any kind, in a fresh interpreter."""
    readme = (ROOT / "README.md").read_text()
    (lines,) = (part.split("```")[0] for part in readme.split("```python\n") if "AutoModelForMaskedLM" in part)
    assert lines.count('"runs/mine/hf"') == 2
    lines = lines.replace('"runs/mine/hf"', repr(str(folder(exports, "bd3"))))
    script = tmp_path / "readme.py"
    script.write_text(lines + "\nprint(type(model).__module__, len(tokenizer))\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "bd3_ds.interop.modeling_bd3_ds 81\n"), done.stderr


def test_tokenizers_give_the_same_ids(exports: dict[str, Path], seen: Path) -> None:
    ids, special, size, decoded = json.loads((seen / "said.json").read_text())
    texts = tiny_text()
    ours = load_tokenizer(str(exports["bd3"] / "tokenizer"))
    assert ids == ours.encode_batch(texts) and sum(map(len, ids)) > 5000
    assert special == [ours.mask_id, ours.bos_id, ours.eos_id, ours.pad_id] and size == ours.vocab_size
    assert decoded.replace("<unk>", " ⁇ ") == ours.decode(ids[0])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters", "numbers", "gpt2", "bert-base-uncased"])
def test_every_kind_of_tokenizer(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """Equal ids on text that the exporter does not look at itself, or a sentence that says why there are none."""
    import transformers

    from bd3_ds.interop.tokenizer import write_auto_tokenizer
    from data_prep.train_tokenizer import train

    texts = tiny_text()
    if kind in ("bpe", "unigram"):
        (tmp_path / "tokenizer.model").write_bytes(train(texts, 400, kind))
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    elif kind in ("characters", "numbers"):
        tokenizer = load_tokenizer("characters") if kind == "characters" else number_tokenizer(11)
        texts = ["3 1 4 1 5 9 2 6 5"] if kind == "numbers" else ["a  line of text"]
    else:
        tokenizer = load_tokenizer(str(request.getfixturevalue("shared") / "data" / "tokenizers" / kind))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    why = write_auto_tokenizer(tmp_path / "saved", tmp_path / "out")
    if kind == "unigram":  # pieces of equal scores, of which the two libraries do not take the same
        assert why is not None and "splits some texts otherwise" in why and not any((tmp_path / "out").iterdir())
        return
    assert why is None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [text + " Ünïcødé — 123,456 \\n x_y" if kind not in ("characters", "numbers") else text for text in texts]
    assert [theirs(text, add_special_tokens=False)["input_ids"] for text in texts] == tokenizer.encode_batch(texts)
    assert theirs.mask_token_id == tokenizer.mask_id and theirs.eos_token_id == tokenizer.eos_id


def test_the_card_has_recipe_and_perplexities(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    export = tiny_export(run)
    line = {"export": export.name, "step": 2, "estimator": "stratified", "nelbo": 2.5, "stderr": 0.01, "tokens": 1200}
    line |= {"chunks": 80, "chunks_in_set": 2000}
    records.append(
        Path(run.run_dir) / "records" / "eval.jsonl",
        line | {"set": "valid", "ppl": 12.18249},
        line | {"set": "other", "ppl": 77.0, "export": "step-00000099"},
    )
    convert("--from", "export", "--to", "hf", run.run_dir, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "| valid | 12.18 ± 0.12 | stratified | 1,200 (the first 80 of 2,000 sequences) |" in card and "77" not in card
    )
    for words in ("block size | 4", "learning rate | 0.0003", "optimizer steps | 2 of 4", "# license: to be filled in"):
        assert words in card
    assert str(tmp_path) not in card
    without = tiny_export(tiny_run(tmp_path), step=4)
    convert("--from", "export", "--to", "hf", without, tmp_path / "other")
    assert "None on record." in (tmp_path / "other" / "README.md").read_text()


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    with hub_stand_in() as running:
        # huggingface_hub reads HF_ENDPOINT when it is imported.
        set_endpoint(monkeypatch, running.url)
        monkeypatch.setenv("HF_TOKEN", running.token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_push_fetch_and_load(exports: dict[str, Path], tmp_path: Path, hub: Hub) -> None:
    words = ("--from", "export", "--to", "hf", "--push", "someone/tiny", "--private")
    convert(*words, exports["bd3"], tmp_path / "hf")
    assert hub.files["someone/tiny"] == content(tmp_path / "hf") and hub.private == ["someone/tiny"]
    assert any(request.startswith("PUT /objects/") for request in hub.requests)  # the weights, as large files are sent
    hub.requests.clear()
    convert("--from", "hf", "someone/tiny", tmp_path / "back")
    assert content(tmp_path / "back") == content(exports["bd3"])
    fetched = [request for request in hub.requests if request.startswith("GET /someone")]
    assert fetched and not any(request.endswith((".py", "README.md")) for request in fetched)

    (tmp_path / "tasks.json").write_text(json.dumps([task("someone/tiny", exports["bd3"])]))
    (tmp_path / "someone").mkdir()
    script = LOGITS + "model.push_to_hub('someone/copy')\n"
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    reader(tmp_path, script, str(tmp_path / "tasks.json"), **environment)
    assert torch.equal(torch.load(tmp_path / "someone" / "tiny.pt")["AutoModel"], logits(exports["bd3"]))
    copy = hub.files["someone/copy"]
    assert {name for name in content(tmp_path / "hf") if name.endswith(".py")} <= set(copy)
    assert "config.json" in copy and "model.safetensors" in copy


def test_pushes_that_fail_are_one_sentence(
    exports: dict[str, Path], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(sentence: str, dst: str, written: bool = True) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            convert("--from", "export", "--to", "hf", "--push", "someone/tiny", exports["ar"], tmp_path / dst)
        assert "\n" not in str(caught.value) and (tmp_path / dst).exists() == written

    hub.refuse = 403
    refused(r"the token is not accepted for it \(403\); .*a is written and whole", "a")
    hub.refuse = 500
    monkeypatch.setattr("time.sleep", lambda _: None)
    refused("the hub answered 500", "b")
    hub.refuse = None
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(r"the token is not accepted for it \(401\)", "c")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    refused("the hub cannot be reached from here", "d")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    refused("set HF_TOKEN", "e", written=False)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--from", "export", "--to", "hff"], "did you mean 'hf'"),
        (["--from", "export", "--to", "hf", "--push", "tiny"], "it must be USER/NAME"),
        (["--from", "export", "--to", "upstream", "--push", "a/b"], "needs --to hf"),
        (["--from", "export", "--to", "hf", "--private"], "--push USER/NAME, which is missing"),
        (["--from", "export", "--to", "hf", "--tokenizer", "gpt2"], "an export has its own"),
        (["--from", "export", "--to", "hf", "--set", "model.heads=2"], "--set is for models of other programs"),
        (["--from", "hf"], "nowhere is not a directory"),
        (["--from", "export", "--to", "hf"], "nowhere not found"),
    ],
)
def test_words_that_do_not_fit(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        convert(*words, tmp_path / "nowhere", tmp_path / "dst")
    assert "\n" not in str(caught.value) and not (tmp_path / "dst").exists()


def test_folders_that_are_damaged(exports: dict[str, Path], tmp_path: Path) -> None:
    convert("--from", "export", "--to", "hf", exports["mdlm"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    weights = load_file(tmp_path / "hf" / "model.safetensors")

    def refused(sentence: str, *words: str) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            convert("--from", "hf", tmp_path / "hf", tmp_path / "dst", *words)
        assert "\n" not in str(caught.value) and not (tmp_path / "dst").exists()

    def changed(**values: object) -> None:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | values))

    refused("brings its own tokenizer", "--tokenizer", "characters")
    for values, sentence in (
        ({"hidden_size": 48}, "says hidden_size=48, but 32 in its run"),
        ({"run": None}, "lacks run or step"),
        ({"run": config["run"] | {"modle": {"heads": 2}}}, "unknown key modle.heads in run in .*config.json"),
        ({"run": config["run"] | {"seed": "often"}}, "seed=often in run in .*config.json must be"),
        ({"run": config["run"] | {"run_dir": "${oc.env:HOME}"}}, "which a resolved configuration does not"),
        ({"run": config["run"] | {"data": []}}, "data in run in .*config.json must be a section"),
        ({"model_type": "bd3lm"}, "use --from upstream"),
        ({"model_type": "bd3_ds"}, "did you mean 'bd3-ds'"),
    ):
        changed(**values)
        refused(sentence)
    changed()
    name = "network.layers.0.up.weight"
    save_file(weights | {name: weights[name].clone().fill_(torch.nan)}, tmp_path / "hf" / "model.safetensors")
    refused(r"not finite \(layers.0.up.weight\)")
    save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "hf" / "model.safetensors")
    refused("layers.0.up.weight is absent there")
    (tmp_path / "hf" / "model.safetensors").write_bytes(content(folder(exports, "mdlm"))["model.safetensors"][:-100])
    refused("damaged or no safetensors file")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    refused(r"pickles \(.bin\) are not read")
    (tmp_path / "hf" / "config.json").unlink()
    refused("config.json not found")


def test_runs_start_from_exports_alone(exports: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(tmp_path, f"train.init_from={folder(exports, 'bd3')}")
    with pytest.raises(UserError, match=r"make an export of it first: run.py convert --from hf"):
        find_start(run)


def test_other_causal_models_go_the_same_way(tmp_path: Path) -> None:
    """GPT-2's weights in our network under transformers' interface compute what transformers' own GPT-2 does."""
    import bd3_ds.hub as hub

    theirs = causal_model("gpt2")
    theirs.save_pretrained(tmp_path / "gpt2")
    convert("--from", "hf", "--to", "hf", tmp_path / "gpt2", tmp_path / "hf")
    ours = hub.BD3ForCausalLM.from_pretrained(tmp_path / "hf")
    text = torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(text).logits[..., :80], theirs(text).logits, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours(text, labels=text).loss, theirs(text, labels=text).loss, atol=1e-4, rtol=1e-5)
    assert "converted" in (tmp_path / "hf" / "README.md").read_text()


def test_what_is_there_is_kept(exports: dict[str, Path], tmp_path: Path) -> None:
    words = ("--from", "export", "--to", "hf", exports["ar"])
    convert(*words, tmp_path / "hf")
    with pytest.raises(UserError, match="already exists"):
        convert(*words, tmp_path / "hf")
    (tmp_path / "hf" / "stale").touch()
    convert(*words, tmp_path / "hf", "--overwrite")
    assert not (tmp_path / "hf" / "stale").exists()
    for precious in (exports["ar"], tmp_path):
        with pytest.raises(UserError, match="no folder of model_type=bd3-ds"):
            convert(*words, precious, "--overwrite")


def test_texts_are_drawn_from_a_folder_as_from_its_export(
    exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for place in (exports["bd3"], folder(exports, "bd3")):
        assert sample_command.main([str(place), "--num", "2", "--length", "12"]) == 0
        texts.append(capsys.readouterr().out.split(sample_command.RULE)[1:3])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("module", ["bd3_ds.interop.folder", "bd3_ds.hub"])
def test_transformers_can_be_imported_by_it_first(module: str) -> None:
    """Beside a CPU-only torch, in an interpreter that has imported nothing before."""
    words = [sys.executable, "-c", f"import {module}\nfrom transformers import PreTrainedModel"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
