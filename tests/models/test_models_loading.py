from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from small_files import logits, write_gguf
from transformers.utils import logging as transformers_logging

from tokenary.core.errors import FetchError, InputError, OptionError, UnknownNameError, UnsupportedModelError
from tokenary.models import find, list_models, load
from tokenary.models import loading as loading_module
from tokenary.models.catalogue import local_source

IDS = [5, 17, 200, 33, 8, 91, 4]


def test_importing_and_listing_need_neither_torch_nor_transformers():
    code = (
        "import sys, tokenary.models as m; rows = m.list_models(); "
        "assert len(rows) == 13 and not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_list_says_what_is_here(cache):
    rows = {row["name"]: row for row in list_models()}
    assert rows["stories260k"]["on_disk"] and not rows["stories260k"]["converted"]
    assert not rows["gemma3-270m"]["on_disk"]
    load("stories260k")
    assert {row["name"]: row["converted"] for row in list_models()}["stories260k"]


@pytest.mark.parametrize("name", ["cifar-vit", "bench-vlm-xs-0", "video-text", "latex-ocr", "mobile-sam"])
def test_vision_networks_are_no_language_models(cache, name):
    with pytest.raises(UnsupportedModelError, match="looks at pictures"):
        load(name)
    assert not list(cache.glob("models/*"))


def test_gguf_gives_the_weights_it_was_made_of(cache, tiny_gguf, llama):
    lm = load(tiny_gguf, dtype="float32")
    assert torch.allclose(logits(lm.model, IDS), logits(llama, IDS), atol=1e-5)
    assert lm.name == "tiny" and lm.eos_token_ids == (0, 1)  # the file's eos and end of turn
    text = "hello, wörld 🦜"
    assert lm.decode(lm.encode([text], raw=True)[0]) == text
    again = load(str(tiny_gguf), dtype="float32")
    assert again.fingerprint == lm.fingerprint and torch.equal(logits(again.model, IDS), logits(lm.model, IDS))
    assert [file.name for file in (cache / "converted").iterdir()] == [lm.fingerprint]


@pytest.mark.real
@pytest.mark.slow
def test_converted_smollm2_equals_what_transformers_reads(smollm2):
    """Nothing is lost on the way through the cache: float32 storage holds every de-quantised weight."""
    file = local_source(find("smollm2"))
    direct = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = smollm2.model.state_dict()
    assert all(torch.equal(ours[key], w) for key, w in direct.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "Grüße, 漢字 🦜\n\tdef f(x): return x**2  # 12345"
    assert tokenizer(text)["input_ids"] == smollm2.encode([text], raw=True)[0]
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert chat == smollm2.encode([text])[0]


def test_gguf_is_converted_once(cache, tiny_gguf, monkeypatch):
    load(tiny_gguf)
    monkeypatch.setitem(sys.modules, "gguf", None)  # a second conversion would need it
    load(tiny_gguf)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.05, 0.001])
def test_truncated_gguf(cache, tiny_gguf, tmp_path, kept):
    data = tiny_gguf.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"cut\.gguf is not a whole GGUF file") as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not list((cache / "converted").iterdir())


def test_corrupt_gguf(cache, tmp_path):
    file = tmp_path / "noise.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + np.random.default_rng(0).bytes(4000))
    with pytest.raises(InputError, match="corrupt or truncated"):
        load(file)
    file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load(file)


def test_gguf_of_an_unknown_architecture(cache, tmp_path, llama):
    with pytest.raises(UnsupportedModelError, match="not supported"):
        load(write_gguf(tmp_path / "odd.gguf", llama, architecture="nonsense"))


def test_gguf_while_another_process_converts_it(cache, tiny_gguf):
    code = "import sys; from tokenary.models import load; print(load(sys.argv[1]).fingerprint)"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tiny_gguf)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and outputs[0] == outputs[1]
    assert len(list((cache / "converted").iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_broken_conversion_leaves_nothing(cache, tiny_gguf, monkeypatch, error):
    def fail(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
        wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FetchError
        with pytest.raises(wanted, match="no space left" if wanted is FetchError else None):
            load(tiny_gguf)
    assert not list((cache / "converted").iterdir())
    assert load(tiny_gguf).context_length == 512


def test_folder(folder, llama):
    lm = load(folder, dtype="float32")
    assert torch.equal(logits(lm.model, IDS), logits(llama, IDS))
    assert lm.tokenizer is None and lm.source == str(folder) and len(lm.fingerprint) == 64
    assert load(folder, dtype="bf16").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float64).dtype == torch.float64


def test_folder_without_config(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \.safetensors"):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "config", "shape", "missing"])
def test_broken_folders_are_one_line(folder, damage):
    from safetensors.torch import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "config":
        config.write_text("{ no json")
    elif damage == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 100}))
    else:  # transformers would go on with random weights
        state = load_file(weights)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, weights, {"format": "pt"})
    with pytest.raises(InputError, match="folder: cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_models_that_are_no_causal_lm(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match="t5 is not a causal"):
        load(folder)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="did you mean smollm2") as caught:
        load("smolm2")
    assert "smollm2" in caught.value.near
    for text in ("./smollm2", "missing.gguf", "/no/such/folder"):
        with pytest.raises(InputError, match="no such file"):
            load(text)


def test_hub_ids(folder, llama, monkeypatch):
    """The hub path is a download followed by the folder path."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    lm = load("org/model", dtype="float32")
    assert lm.name == "org/model" and torch.equal(logits(lm.model, IDS), logits(llama, IDS))

    def unreachable(*args, **options):
        raise LocalEntryNotFoundError("no connection\nand no copy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FetchError, match=r"cannot fetch org/model from the hub: no connection$"):
        load("org/model")


@pytest.mark.parametrize("options", [{"dtype": "bf17"}, {"dtype": torch.int8}, {"device": "abacus"}])
def test_wrong_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        load("stories260k", **options)


def test_auto_dtype_follows_the_cpu(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert loading_module._dtype("auto", cpu) == dtype


def test_loading_is_silent_and_leaves_no_global_state(cache, tiny_gguf, capfd, caplog):
    transformers_logging.set_verbosity(transformers_logging.INFO)
    before = torch.get_default_dtype(), transformers_logging.is_progress_bar_enabled(), torch.get_rng_state()
    try:
        load(tiny_gguf)
        load("stories260k")
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(transformers_logging.WARNING)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert before[:2] == (torch.get_default_dtype(), transformers_logging.is_progress_bar_enabled())
    assert torch.equal(before[2], torch.get_rng_state())


def test_threads_may_load_at_once(cache, folder):
    verbosity, found = transformers_logging.get_verbosity(), []
    threads = [threading.Thread(target=lambda: found.append(load(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and transformers_logging.get_verbosity() == verbosity
