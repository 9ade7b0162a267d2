"""Weight files: both formats, complete and by rows, against the reference libraries; corruption; interrupted writes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.weights import (
    SAFETENSORS_DTYPES,
    SafetensorsWriter,
    open_safetensors,
    open_weights,
)
from tests.support.checkpoints import DENSE_SHA256, MOE_SHA256, make_tiny_checkpoint

ROOT = Path(__file__).parents[2]


def sample_tensors():
    """Return tensors of every dtype, including shapes that are easy to get wrong: scalar, empty, odd byte counts."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f'é.{index} "{dtype}"': (torch.randn(5, index + 1, 3, generator=generator) * 10).to(dtype)
        for index, dtype in enumerate(SAFETENSORS_DTYPES.values())
    }
    return tensors | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "norm.weight": torch.ones(7).bfloat16()}


def save_in(folder: Path, tensors, kind: str) -> Path:
    if kind == "pth":
        torch.save(tensors, folder / "consolidated.00.pth")
    elif kind == "safetensors":
        save_file(tensors, folder / "consolidated.safetensors")
    else:
        for part in range(3):
            names = sorted(tensors)[part::3]
            name = f"consolidated-{part + 1:05d}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names}, folder / name)
    return folder


def write_all(path: Path, tensors) -> None:
    with SafetensorsWriter(path, {name: (t.shape, t.dtype) for name, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.contiguous().reshape(-1).view(torch.uint8).equal(expected.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", ["pth", "safetensors", "shards"])
def test_reads_files_of_the_reference_libraries(tmp_path, kind):
    tensors = sample_tensors()
    reader = open_weights(save_in(tmp_path, tensors, kind))
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert reader.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
    assert reader.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    for name, tensor in tensors.items():
        assert_identical(reader.read(name), tensor)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, None), slice(None), slice(2, 2), slice(4, 99), slice(-2, None)])
def test_rows_are_a_slice_of_the_first_dimension(tmp_path, kind, rows):
    tensors = sample_tensors()
    reader = open_weights(save_in(tmp_path, tensors, kind))
    for name, tensor in tensors.items():
        if tensor.dim():
            assert_identical(reader.read(name, rows), tensor[rows])


def test_read_returns_new_memory(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(3)}, file)
    reader = open_safetensors(file)
    reader.read("a").zero_()
    assert_identical(reader.read("a"), torch.ones(3))


def test_pth_tensors_may_share_storage(tmp_path):
    whole = torch.arange(40.0).reshape(10, 4)
    torch.save({"part": whole[3:6], "whole": whole, "tied": whole}, tmp_path / "consolidated.00.pth")
    reader = open_weights(tmp_path)
    assert_identical(reader.read("part"), whole[3:6])
    assert_identical(reader.read("tied", slice(1, 3)), whole[1:3])


def test_writer_output_is_identical_to_the_reference_writer(tmp_path):
    tensors = sample_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors")
    write_all(tmp_path / "ours.safetensors", tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def test_writer_accepts_tensors_in_any_order_and_memory_layout(tmp_path):
    tensors = {"b": torch.randn(4, 6).T, "a": torch.nn.Parameter(torch.randn(3))}
    write_all(tmp_path / "x.safetensors", tensors)
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert_identical(tensor, tensors[name].detach())


@pytest.mark.parametrize("moe, sha256", [(False, DENSE_SHA256), (True, MOE_SHA256)])
def test_tiny_checkpoints_equal_the_golden_data(tmp_path, moe, sha256):
    folder = make_tiny_checkpoint(tmp_path / "tiny", moe=moe)
    assert hashlib.sha256((folder / "consolidated.safetensors").read_bytes()).hexdigest() == sha256


# Corruption


def test_every_truncation_is_detected_on_open(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3)}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"lora.safetensors has {size} bytes .*again"):
            open_safetensors(file)


def test_truncated_pth_is_detected_on_open(tmp_path):
    file = save_in(tmp_path, {"a": torch.ones(100, 100)}, "pth") / "consolidated.00.pth"
    whole = file.read_bytes()
    for size in (0, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"consolidated.00.pth has {size} bytes .*again"):
            open_weights(tmp_path)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "does not begin with a safetensors header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "does not begin with a safetensors"),
        ((500).to_bytes(8, "little") + b"{}", "has 10 bytes but its header alone should have 508"),
        ((2).to_bytes(8, "little") + b"{}" + b"junk", "has 14 bytes but its header declares 10"),
        ((2).to_bytes(8, "little") + b"{{", "header that cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "header that cannot be read"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "header that cannot be read"),
    ],
)
def test_other_files_are_rejected(tmp_path, content, sentence):
    (tmp_path / "consolidated.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F4","shape":[4],"data_offsets":[0,2]}',
        '{"dtype":"F32","shape":[4],"data_offsets":[0,12]}',
        '{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}',
        '{"dtype":"F32","shape":[4]}',
        '{"dtype":"F32","shape":"4","data_offsets":[0,"16"]}',
        "7",
    ],
)
def test_invalid_header_entries_are_rejected(tmp_path, entry):
    header = f'{{"norm.weight":{entry}}}'.encode()
    (tmp_path / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="header that cannot be read"):
        open_safetensors(tmp_path / "lora.safetensors")


def test_truncation_after_opening_is_detected(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(4)}, file)
    reader = open_safetensors(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends inside `a`"):
        reader.read("a")


class Evil:
    def __reduce__(self):
        return (print, ("code ran while loading weights",))


@pytest.mark.parametrize(
    "content, sentence",
    [
        ({"a": Evil()}, "cannot be read as a table of tensors"),
        ({"model": {"a": torch.ones(1)}}, "flat dict of tensors"),
        ([torch.ones(1)], "flat dict of tensors .* found list"),
        ({"a": torch.ones(2, 3).T}, "`a` was saved transposed"),
    ],
)
def test_pth_with_unsupported_content_is_rejected(tmp_path, capsys, content, sentence):
    torch.save(content, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=sentence):
        open_weights(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_folder_without_weights_or_with_several_sets_is_rejected(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match=r"contains no weights.*found model-00001.*Hugging Face layout"):
        open_weights(tmp_path)
    save_in(tmp_path, {"a": torch.ones(1)}, "safetensors")
    open_weights(tmp_path)
    save_in(tmp_path, {"a": torch.ones(1)}, "pth")
    with pytest.raises(UserError, match=r"consolidated\.safetensors and consolidated\.00\.pth: keep only"):
        open_weights(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    save_in(tmp_path, {"a": torch.ones(1)}, "shards")
    with pytest.raises(UserError, match=r"consolidated\.safetensors and 3 shards"):
        open_weights(tmp_path)


def test_missing_paths_are_rejected(tmp_path):
    for name in ("no_folder", "no.pth", "no.safetensors"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            open_weights(tmp_path / name)


def test_shards_must_be_complete_and_disjoint(tmp_path):
    save_in(tmp_path, sample_tensors(), "shards")
    second = tmp_path / "consolidated-00002-of-00003.safetensors"
    third = tmp_path / "consolidated-00003-of-00003.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"3 shards.*missing or unexpected: consolidated-00002-of-00003\.safetensors"):
        open_weights(tmp_path)
    second.write_bytes(kept)
    third.write_bytes(kept)
    with pytest.raises(UserError, match=r"is in both .*00002-of.* and .*00003-of"):
        open_weights(tmp_path)


# Interrupted writes


def test_interrupted_write_keeps_the_existing_file(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"old")
    declared = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(file, declared) as writer:
        writer.write("a", torch.ones(2))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="not written: b"), SafetensorsWriter(file, declared) as writer:
        writer.write("a", torch.ones(2))
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "name, tensor", [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).bfloat16()), ("a", torch.ones(()))]
)
def test_writer_rejects_undeclared_tensors(tmp_path, name, tensor):
    with pytest.raises(ValueError), SafetensorsWriter(tmp_path / "x", {"a": ((2,), torch.float32)}) as writer:
        writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


def test_writer_rejects_a_file_larger_than_the_disk(tmp_path):
    declared = {"a": ((2**40, 2**20), torch.float32)}
    with (
        pytest.raises(UserError, match=r"needs .* GB, but its disk has .* GB free"),
        SafetensorsWriter(tmp_path / "x", declared),
    ):
        pass
    assert not list(tmp_path.iterdir())


# Memory

MEASURE = """
import sys
from pathlib import Path
from model.weights import open_weights

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

before = kib("VmRSS")
reader = open_weights(Path(sys.argv[1]))
copies = {name: reader.read(name) for name in reader.shapes}
print((kib("VmHWM") - before) * 1024 / reader.size_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_reading_a_checkpoint_needs_little_more_memory_than_its_size(tmp_path, kind):
    save_in(tmp_path, {f"layers.{index}": torch.ones(4096, 1024).bfloat16() for index in range(12)}, kind)  # 96 MiB
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.2
