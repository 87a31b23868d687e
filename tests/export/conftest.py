"""Tiny models and adapters on disk, and hubs on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.model import make_tiny_model
from tests.export.fake_hubs import FakeHub, FakeHuggingFace, FakeModelScope, serving


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small the threads of torch only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of base models: a Qwen2 of hidden 64 and 2 layers with weights large enough to matter."""
    root = tmp_path_factory.mktemp("bases")

    def make(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
        plain = make_tiny_model(root / f"tied-{tied}", tied=tied, hidden=64, layers=2, init_std=0.2)
        if dtype == torch.float32:
            return plain
        path = root / f"tied-{tied}-{dtype}"
        if not path.exists():
            save_model(
                AutoModelForCausalLM.from_pretrained(plain, dtype=dtype), path, load_tokenizer(str(plain))
            )
        return path

    return make


Train = Callable[..., Path]


@pytest.fixture
def train() -> Train:
    """Factory of adapters: every trainable number is moved at random, as training would move it."""

    def make(
        path: Path,
        base: Path,
        *,
        settings: TunerSettings | None = None,
        seed: int = 0,
        on: tuple[Path, ...] = (),
    ) -> Path:
        model = load_model(str(base)).model
        if on:
            model = apply_tuner(model, TunerSettings(tuner_type="full"), [str(p) for p in on]).model
        torch.manual_seed(seed)  # of the adapter's first weights
        tuned = apply_tuner(model, settings or TunerSettings(lora_rank=4)).model
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        save_model(tuned, path, load_tokenizer(str(base)))
        return path

    return make


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The source of a push: an adapter's files among the state of a run. No model is needed to make it."""
    path = tmp_path / "run" / "checkpoint-7"
    (path / "optimizer").mkdir(parents=True)
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 300)
    (path / "tokenizer.json").write_text("{}" * 5)
    (path / "empty.txt").write_text("")
    (path / "chat [1].jinja").write_text("{{ messages }}")
    (path / "optimizer" / "optimizer-rank0.safetensors").write_bytes(b"o" * 1000)
    (path / "trainer_state.json").write_text("{}")
    (path / ".hidden").write_text("")
    return path


PUSHED = ("adapter_config.json", "adapter_model.safetensors", "chat [1].jinja", "empty.txt", "tokenizer.json")


@pytest.fixture
def quiet_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No token, no login, no waiting, and the clients' own files under the returned folder."""
    home = tmp_path / "home"
    for name in ("MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_HOME", str(home / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "modelscope-cache"))
    # Read when huggingface_hub is imported, which other tests have done by now.
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "hf-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("raytune_rl.export.push.WAIT", lambda state: 0)
    return home


@pytest.fixture(params=["modelscope", "huggingface"])
def hub(
    request: pytest.FixtureRequest, quiet_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """Each of the two hubs in turn."""
    with serving(FakeHuggingFace() if request.param == "huggingface" else FakeModelScope()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        yield hub
