"""Upstream's folders become exports whose logits are upstream's."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bd3_ds
from bd3_ds.commands import convert as convert_command
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.data.tokenizer import number_tokenizer
from bd3_ds.model.dit import DiT, DiTConfig
from bd3_ds.runtime.errors import UserError
from tests.helpers.hub_stand_in import hub_stand_in
from tests.helpers.tiny import tiny_export, tiny_run

OURS_TO_THEIRS = [  # the inverse of the table in bd3_ds/interop/bd3lms.py, written out for its own sake
    (r"^embed\.weight$", "vocab_embed.embedding"),
    (r"^time\.expand", "sigma_map.mlp.0"),
    (r"^time\.mix", "sigma_map.mlp.2"),
    (r"^layers\.(\d+)\.norm_attention", r"blocks.\1.norm1"),
    (r"^layers\.(\d+)\.norm_mlp", r"blocks.\1.norm2"),
    (r"^layers\.(\d+)\.qkv", r"blocks.\1.attn_qkv"),
    (r"^layers\.(\d+)\.out", r"blocks.\1.attn_out"),
    (r"^layers\.(\d+)\.up", r"blocks.\1.mlp.0"),
    (r"^layers\.(\d+)\.down", r"blocks.\1.mlp.2"),
    (r"^layers\.(\d+)\.modulation", r"blocks.\1.adaLN_modulation"),
    (r"^head\.norm", "output_layer.norm_final"),
    (r"^head\.linear", "output_layer.linear"),
    (r"^head\.modulation", "output_layer.adaLN_modulation"),
]
FLAGS = {
    AR: {"causal": True, "cross_attn": False},
    BD3: {"cross_attn": True, "block_size": 4},
    MDLM: {"cross_attn": False, "block_size": 8},
    SEDD: {"time_conditioning": True},
}


def config_of(objective, **changes):
    base = {"model_length": 8, "vocab_size": 13, "hidden_dim": 16, "n_blocks": 2, "n_heads": 2, "cond_dim": 8}
    return base | {"dropout": 0.1, "var_min": True, "sampling_eps_max": 0.999} | FLAGS[objective] | changes


def their_name(name):
    for pattern, replacement in OURS_TO_THEIRS:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(name)


def upstream_folder(path, config, weights):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


@pytest.fixture
def source(tmp_path):
    """Makes an upstream folder of random weights; returns it and the network that they belong to."""

    def make(objective, prefix="backbone.", name="src", **changes):
        torch.manual_seed(0)
        model = DiT(DiTConfig(13, 16, 2, 2, 4, 8, objective == AR)).eval()
        weights = {}
        for key, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
            weights[prefix + their_name(key)] = parameter.detach()
        weights[prefix + "rotary_emb.inv_freq"] = torch.ones(4)
        weights |= {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(1.0)}
        return upstream_folder(tmp_path / name, config_of(objective, **changes), weights), model

    return make


def convert(src, dst, *words):
    assert convert_command.main(["--from", "upstream", str(src), str(dst), *words]) == 0
    return bd3_ds.load(str(dst))


@pytest.mark.parametrize("objective, block_size", [(AR, 1), (BD3, 4), (MDLM, 8), (SEDD, 8)])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_converted_models_compute_the_same(source, tmp_path, objective, block_size, prefix):
    src, network = source(objective, prefix)
    model = convert(src, tmp_path / "exports" / "one")
    assert (model.run.objective.name, model.block_size, model.mask_id) == (objective, block_size, 12)
    assert model.run.data.length == 8 and model.tokenizer is None and model.export.step == 0
    text = torch.randint(0, 13, (2, 8), generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0.5, 2.0]) if objective == SEDD else None
    with torch.no_grad():
        expected = network(text, text, block_size=block_size, sigma=sigma)
    torch.testing.assert_close(model.logits(text, text, sigma=sigma), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["ar", "mdlm", "sedd", "bd3lm_b4", "bd3lm_b1_nll"])
def test_golden_models(shared, tmp_path, case):
    golden = shared / "golden"
    facts = json.loads((golden / f"{case}.json").read_text())
    state = np.load(golden / ("state_dict_causal.npz" if facts["causal"] else "state_dict_adaln.npz"))
    config = {
        "block_size": facts["block_size"],
        "vocab_size": facts["vocab_size"],
        "model_length": facts["model"]["length"],
        "cross_attn": facts["algo"]["cross_attn"],
        "causal": facts["causal"],
        "time_conditioning": facts["algo"]["time_conditioning"],
        "hidden_dim": facts["model"]["hidden_size"],
        "cond_dim": facts["model"]["cond_dim"],
        "n_blocks": facts["model"]["n_blocks"],
        "n_heads": facts["model"]["n_heads"],
    }
    weights = {name: torch.from_numpy(array) for name, array in state.items()}
    model = convert(upstream_folder(tmp_path / "src", config, weights), tmp_path / "dst")
    data = {name: torch.from_numpy(array) for name, array in np.load(golden / f"{case}.npz").items()}
    if case == "ar":
        logits = model.logits(data["input_tokens"])
    else:
        logits = model.logits(data["xt"], data["x0"], data["sigma_to_backbone"] if case == "sedd" else None)
    torch.testing.assert_close(logits, data["logits"], atol=1e-5, rtol=1e-5)


def test_tokenizer_and_mask(source, tmp_path):
    number_tokenizer(11).save(tmp_path / "fits")  # 11 words, EOS, mask
    number_tokenizer(9).save(tmp_path / "small")
    src, _ = source(BD3)
    model = convert(src, tmp_path / "dst", "--tokenizer", str(tmp_path / "fits"))
    assert model.tokenizer.mask_id == model.mask_id == 12
    assert len(model.generate(num=2)) == 2
    with pytest.raises(UserError, match="vocab_size is 11, the model's 13"):
        convert(src, tmp_path / "other", "--tokenizer", str(tmp_path / "small"))
    assert not (tmp_path / "other").exists()
    masked, _ = source(BD3, name="masked", mask_index=3)
    assert convert(masked, tmp_path / "third").mask_id == 3


def test_what_is_there_is_kept(source, tmp_path):
    src, _ = source(BD3)
    convert(src, tmp_path / "dst")
    with pytest.raises(UserError, match="already exists"):
        convert(src, tmp_path / "dst")
    convert(src, tmp_path / "dst", "--overwrite")
    for precious in (src, tmp_path):
        with pytest.raises(UserError, match="is no export"):
            convert(src, precious, "--overwrite")
    assert (src / "config.json").is_file()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"n_heads": 3}, "model.heads=3"),
        ({"hidden_dim": 32}, r"do not fit the model: embed.weight is \(13, 16\) there, \(13, 32\) here"),
        ({"n_blocks": 3}, "layers.2.down.bias is absent there"),
        ({"block_size": 3}, "block_size=3 must divide"),
        ({"mask_index": 13}, "mask_index=13"),
        ({"vocab_size": "many"}, "vocab_size=many"),
    ],
)
def test_configurations_that_do_not_fit(source, tmp_path, changes, sentence):
    src, _ = source(BD3, **changes)
    with pytest.raises(UserError, match=sentence):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("key", ["model_length", "block_size", "hidden_dim", "vocab_size"])
def test_keys_that_are_missing(source, tmp_path, key):
    src, _ = source(BD3)
    config = config_of(BD3)
    del config[key]
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"lacks {key}"):
        convert(src, tmp_path / "dst")


def test_files_that_are_missing_or_damaged(source, tmp_path):
    src, _ = source(BD3)
    dst = tmp_path / "dst"
    weights = src / "model.safetensors"
    config = (src / "config.json").read_text()
    (src / "config.json").write_text("[]")
    with pytest.raises(UserError, match="one JSON object"):
        convert(src, dst)
    (src / "config.json").write_text(config)
    with pytest.raises(UserError, match="not a directory"):
        convert(tmp_path / "nowhere", dst)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        convert(src, dst)
    weights.rename(src / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickles \(.bin\) are not read"):
        convert(src, dst)
    (src / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        convert(src, dst)
    (src / "config.json").unlink()
    with pytest.raises(UserError, match="not found"):
        convert(src, dst)


@pytest.mark.parametrize("objective, block_size", [(AR, 1), (BD3, 4), (MDLM, 8), (SEDD, 8)])
def test_upstream_and_back(source, tmp_path, objective, block_size):
    """The same tensors under the same names, and a config.json that makes the same export once more."""
    src, _ = source(objective, mask_index=3)
    convert(src, tmp_path / "ours")
    words = ["--from", "export", "--to", "upstream", str(tmp_path / "ours"), str(tmp_path / "theirs")]
    assert convert_command.main(words) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (src, tmp_path / "theirs"))
    assert before.keys() == after.keys()
    # The buffers are upstream's own values; those of the source are made up.
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "backbone.rotary_emb.inv_freq",
        "sampling_eps_max",
    }
    torch.testing.assert_close(after["backbone.rotary_emb.inv_freq"], 1e4 ** (-torch.arange(0, 8, 2) / 8))
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["block_size"] == (8 if objective == AR else block_size) and config["mask_index"] == 3
    again = convert(tmp_path / "theirs", tmp_path / "ours", "--overwrite")
    assert (again.run.objective.name, again.block_size, again.mask_id) == (objective, block_size, 3)


def test_networks_that_upstream_does_not_have(tmp_path):
    for words, sentence in (
        (("model.tie_embeddings=true",), "tie_embeddings=True is not in upstream's network, which has False"),
        (("model.biases=[qkv]",), r"biases=\['qkv'\] is not"),
        (("model.vocab_multiple=8",), "no rows beyond its vocabulary"),
        (("model.mlp_size=48",), "an MLP of width 48"),
    ):
        export = tiny_export(tiny_run(tmp_path, *words))
        with pytest.raises(UserError, match=sentence):
            convert_command.main(["--from", "export", "--to", "upstream", str(export), str(tmp_path / "dst")])
        assert not (tmp_path / "dst").exists()


MDLM_RELEASE = {  # as the releases of MDLM say it, before bd3lms
    "model_type": "mdlm",
    "architectures": ["MDLM"],
    "auto_map": {"AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
    "time_conditioning": False,
    "return_dict": False,
    "dropout": 0.1,
}


def test_releases_of_mdlm(source, tmp_path):
    src, network = source(MDLM)
    config = {key: config_of(MDLM)[key] for key in ("model_length", "vocab_size", "hidden_dim", "n_blocks", "n_heads")}
    config |= MDLM_RELEASE | {"cond_dim": 8}
    (src / "config.json").write_text(json.dumps(config))
    (src / "modeling_mdlm.py").write_text("raise SystemExit('remote code was run')")
    model = convert(src, tmp_path / "dst")
    assert (model.run.objective.name, model.block_size, model.mask_id) == (MDLM, 8, 12)
    text = torch.randint(0, 13, (2, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = network(text, block_size=8)
    torch.testing.assert_close(model.logits(text), expected, atol=1e-6, rtol=1e-5)
    (src / "config.json").write_text(json.dumps(config | {"time_conditioning": True}))
    with pytest.raises(UserError, match="time_conditioning=true"):
        convert(src, tmp_path / "other")
    with pytest.raises(UserError, match="use --from upstream"):
        convert_command.main(["--from", "hf", str(src), str(tmp_path / "other")])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_stand_in() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_names_on_the_hub(source, tmp_path, hub):
    src, network = source(BD3)
    (src / "modeling_bd3lm.py").write_text("raise SystemExit('remote code was run')")
    (src / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.put("kuleshov-group/bd3lm-owt-block_size4", src)
    model = convert("kuleshov-group/bd3lm-owt-block_size4", tmp_path / "dst")
    assert torch.equal(model.network.embed.weight, network.embed.weight) and model.block_size == 4
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json", "model.safetensors"}

    (src / "model.safetensors").unlink()
    hub.put("someone/pickled", src)
    (src / "config.json").unlink()
    hub.put("someone/empty", src)
    for name, sentence in (
        ("someone/nothing", "cannot be fetched from the hub: there is no such model"),
        ("someone/pickled", r"has no safetensors, and pickles \(.bin\) are not read"),
        ("someone/empty", "has no config.json"),
        ("a/b/c", "a/b/c is not a directory"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            convert(name, tmp_path / "other")
        assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


class Foreign:
    """Stands for OmegaConf's objects in upstream's hyper-parameters."""


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def lightning(tmp_path):
    """Makes a Lightning file of random averaged weights; returns it and the network that they belong to."""

    def make(causal=False, **more):
        torch.manual_seed(0)
        model = DiT(DiTConfig(13, 16, 2, 2, 4, 8, causal)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        names = [name for name, _ in model.named_parameters()]
        state = {f"backbone.{their_name(name)}": torch.zeros_like(model.get_parameter(name)) for name in names}
        average = {"decay": 0.999, "shadow_params": [p.detach().clone() for p in model.parameters()]}
        content = {"state_dict": state, "ema": average, "hyper_parameters": {"config": Foreign()}}
        torch.save(content | more, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt", model

    return make


def test_lightning_files(lightning, tmp_path):
    src, network = lightning(hyper_parameters=Hostile(str(tmp_path / "touched")))
    words = ["--set", "objective.name=bd3", "--set", "objective.block_size=4", "--set", "model.heads=2"]
    model = convert(src, tmp_path / "dst", *words, "--set", "data.length=8", "--set", "model.mask_id=5")
    assert not (tmp_path / "touched").exists()
    assert (model.block_size, model.mask_id, model.run.data.length, model.run.model.mlp_ratio) == (4, 5, 8, 4)
    text = torch.randint(0, 13, (2, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(text, text), network(text, text, block_size=4), atol=1e-6, rtol=1e-5)
    for given, sentence in (
        ([], "--set objective.name=bd3 --set objective.block_size=16$"),
        (["--set", "objective.name=ar"], "objective.name=ar does not fit .*time conditioning"),
        (["--set", "objective.name=bd3", "--set", "objective.block_size=3"], "block_size=3 must divide"),
        (["--set", "objective.name=mdlm", "--set", "model.layers=3"], "model.layers cannot be changed here"),
        (["--set", "objective.name=mdlm", "--set", "model.mask_id=13"], "model.mask_id=13 is not an id"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert(src, tmp_path / "other", "--set", "model.heads=2", "--set", "data.length=8", *given)
    with pytest.raises(UserError, match=r"--set model.heads=12 --set data.length=1024"):
        convert(src, tmp_path / "other")
    src, network = lightning(causal=True)
    model = convert(src, tmp_path / "causal", "--set", "model.heads=2", "--set", "data.length=8")
    assert model.run.objective.name == AR
    with torch.no_grad():
        torch.testing.assert_close(model.logits(text), network(text, block_size=1), atol=1e-6, rtol=1e-5)
    assert not (tmp_path / "other").exists()


def test_hostile_pickles_do_nothing(lightning, tmp_path):
    touched = tmp_path / "touched"
    src, _ = lightning(state_dict={"backbone.vocab_embed.embedding": Hostile(str(touched))}, ema=None)
    with pytest.raises(UserError, match="no weights in its state_dict"):
        convert(src, tmp_path / "dst", "--set", "model.heads=2")
    src.write_bytes(src.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        convert(src, tmp_path / "dst")
    assert not touched.exists() and not (tmp_path / "dst").exists()
    pickle.loads(pickle.dumps(Hostile(str(touched)))).close()
    assert touched.exists()  # it would have, had it been run


def test_weights_that_are_not_finite(source, tmp_path):
    src, _ = source(BD3)
    weights = load_file(src / "model.safetensors")
    name = "backbone.blocks.1.attn_qkv.weight"
    save_file(weights | {name: weights[name].clone().fill_(torch.nan)}, src / "model.safetensors")
    with pytest.raises(UserError, match=r"not finite \(layers.1.qkv.weight\)"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(UserError, match=r"--set model.heads=2 is for Lightning files"):
        convert(src, tmp_path / "dst", "--set", "model.heads=2")


def test_foreign_weights_and_words(source, tmp_path):
    src, _ = source(BD3)
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, src / "model.safetensors")
    with pytest.raises(UserError, match="not a weight that upstream's models have"):
        convert(src, tmp_path / "dst")
    for words, sentence in (
        (["--from", "jax", "a", "b"], "--from jax is unknown"),
        (["--from", "upstream", "--to", "hub", "a", "b"], "--to hub is unknown"),
        (["--from", "export", "--to", "upstrem", "a", "b"], "did you mean 'upstream'"),
        (["--from", "export", "a", "b"], "changes nothing"),
        (["a", "b"], "--from"),
        (["--from", "upstream", "a"], "DST"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert_command.main(words)
