"""torch.load and torch.save: storages tagged by any device, map_location, and names that are never touched."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_adapt

pytestmark = pytest.mark.usefixtures("facade")
TAGS = ["cuda:0", "cuda:1", "cuda:7", "cuda", "npu:0", "mlu:3", "privateuseone:0", "cpu"]


def saved(tag: str, **options: Any) -> io.BytesIO:
    """A checkpoint whose storages carry a tag, as the device of that name would have written it."""
    plain = io.BytesIO()
    torch.save({"w": torch.arange(4.0), "step": 3, "view": torch.arange(4.0)[1:3]}, plain, **options)
    if options.get("_use_new_zipfile_serialization") is False:
        return io.BytesIO(_retagged(plain.getvalue(), tag))
    tagged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain.getvalue())) as old, zipfile.ZipFile(tagged, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, _retagged(data, tag) if name.endswith("data.pkl") else data)
    tagged.seek(0)
    return tagged


def _retagged(data: bytes, tag: str) -> bytes:
    """Rewrite the pickled string "cpu" (BINUNICODE: X, length in four bytes, text)."""
    old = b"X" + (3).to_bytes(4, "little") + b"cpu"
    assert old in data
    return data.replace(old, b"X" + len(tag).to_bytes(4, "little") + tag.encode())


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_tag_of_any_device_loads(tag: str, weights_only: bool, zipped: bool) -> None:
    """A checkpoint written on a CUDA, NPU or MLU device, by whatever ordinal, loads without a map_location."""
    file = saved(tag, _use_new_zipfile_serialization=zipped)
    found = torch.load(file, weights_only=weights_only)
    assert found["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found["view"].tolist() == [1.0, 2.0]
    assert found["w"].is_cuda
    assert found["step"] == 3


MAPS: dict[str, Any] = {
    "cuda": "cuda",
    "cuda:1": "cuda:1",
    "torch.device": lambda: torch.device("cuda"),
    "dict": {"cuda:0": "cuda:1"},
    "cpu": "cpu",
}


@pytest.mark.parametrize("where", MAPS.values(), ids=MAPS.keys())
def test_map_location(where: Any) -> None:
    """map_location takes devices as strings, torch.device objects and dictionaries."""
    place = where() if callable(where) else where
    assert torch.load(saved("cuda:0"), map_location=place)["w"].is_cuda
    assert torch.load(saved("cuda:0"), place)["w"].is_cuda


def test_map_location_functions() -> None:
    """The idioms `lambda storage, _: storage.cuda(rank)` and `lambda storage, _: storage` work, and see the tag."""
    tags: list[str] = []

    def place(storage: Any, tag: str) -> Any:
        tags.append(tag)
        return storage.cuda(1)

    assert torch.load(saved("cuda:5"), map_location=place)["w"].is_cuda
    assert set(tags) == {"cuda:5"}
    assert torch.load(saved("cuda:5"), map_location=lambda storage, _: storage)["w"].is_cuda


def test_meta_is_meta() -> None:
    """map_location="meta" loads no data, as in torch."""
    assert torch.load(saved("cuda:0"), map_location="meta")["w"].device.type == "meta"


def test_a_path_is_never_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file called cuda, cuda:0 or my_cuda_ckpt.pt is saved, loaded and mapped into memory under that name."""
    monkeypatch.chdir(tmp_path)
    for name in ("cuda", "cuda:0", "my_cuda_ckpt.pt", str(tmp_path / "cuda.pt")):
        torch.save(torch.ones(2), name)
        assert Path(name).exists()
        assert torch.load(name).tolist() == [1.0, 1.0]
        assert torch.load(name, map_location="cuda", mmap=True).tolist() == [1.0, 1.0]


def test_devices_inside_a_checkpoint() -> None:
    """A torch.device in a checkpoint is restored; one of CUDA becomes this device."""
    file = io.BytesIO()
    torch.save({"place": torch.device("cuda:1")}, file)
    file.seek(0)
    assert torch.load(file)["place"] == torch.device("cpu")


def test_what_is_written_here_loads_anywhere() -> None:
    """A checkpoint written under the facade loads in a torch that knows nothing of it."""
    file, devices = io.BytesIO(), pickle.dumps(torch.device("cuda"))
    torch.save({"w": torch.ones(2, device="cuda"), "place": torch.device("cuda")}, file)
    file.seek(0)
    llm_adapt.unpatch()
    found = torch.load(file)
    assert found["w"].device.type == found["place"].type == pickle.loads(devices).type == "cpu"


def test_an_unknown_tag_is_an_error() -> None:
    """A tag of no device is torch's error, not a guess."""
    with pytest.raises(RuntimeError, match="don't know how to restore data location"):
        torch.load(saved("cudapotato"))


def test_a_training_state_is_resumed(tmp_path: Path) -> None:
    """Model, optimizer, scaler and random state of a run are saved and restored exactly."""

    def step(model: Any, optimizer: Any) -> list[float]:
        optimizer.zero_grad()
        torch.nn.functional.dropout(model(torch.ones(2, 4, device="cuda"))).sum().backward()
        optimizer.step()
        return model.weight.flatten().tolist()  # type: ignore[no-any-return]

    model = torch.nn.Linear(4, 4, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "rng": torch.cuda.get_rng_state_all()}, tmp_path / "cuda.pt")
    expected = step(model, optimizer)
    fresh = torch.nn.Linear(4, 4, device="cuda")
    again = torch.optim.AdamW(fresh.parameters(), fused=True)
    found = torch.load(tmp_path / "cuda.pt", map_location="cuda:0")
    fresh.load_state_dict(found["model"])
    again.load_state_dict(found["optimizer"])
    torch.cuda.set_rng_state_all(found["rng"])
    assert step(fresh, again) == expected


def test_torchscript_archives(tmp_path: Path) -> None:
    """torch.jit.load takes a CUDA map_location."""
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(scripted, str(tmp_path / "cuda.pt"))
    assert torch.jit.load(str(tmp_path / "cuda.pt"), map_location="cuda")(torch.ones(1, 2)).is_cuda


def test_after_unpatch_a_tag_is_torch_s_again(facade: Any, tmp_path: Callable[..., Any]) -> None:
    """Without the facade torch refuses a CUDA tag as before."""
    llm_adapt.unpatch()
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on a CUDA device"):
        torch.load(saved("cuda:0"))
