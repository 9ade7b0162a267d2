"""Downloads from a hub on loopback: complete, continued after a kill, verified; every refusal says what to do."""

import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from docs.generate_models import PAGE, models_page
from model.errors import UserError
from tests.support.hub_server import COMMIT, REPOSITORY, FakeHub, only_hub
from utils import fetch_model, plan
from utils.models.hub import RemoteFile, choose_files
from utils.models.known_models import KNOWN_MODELS, RELEASES, known_shapes

ROOT = Path(__file__).parents[2]
NAME = "mistral-7b-v0.3"
LARGE = 24 << 20  # more than two chunks of huggingface_hub, which writes a chunk at a time
WEIGHTS, TOKENIZER = "consolidated.safetensors", "tokenizer.model.v3"
READ = {"params.json", TOKENIZER, WEIGHTS}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    random_bytes = random.Random(0).randbytes
    files = {"params.json": b'{"dim": 8}\n', TOKENIZER: random_bytes(999), WEIGHTS: random_bytes(4321)}
    files |= {"config.json": b"{}", "model-00001-of-00001.safetensors": b"other", "README.md": b"# Mistral"}
    with only_hub(files, monkeypatch, tmp_path / "no_token") as server:
        yield server


def test_only_the_files_that_are_read_are_downloaded_and_verified(hub: FakeHub, run_command, tmp_path):
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 0, said
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == {
        name: content for name, content in hub.files.items() if name in READ
    }
    assert {name for name, _ in hub.downloaded()} == READ
    assert f"{REPOSITORY} (Apache-2.0, revision cccccccccccc): 3 files, 0.0 MB to download." in said
    assert "its checksums are right" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no leftovers


def test_a_complete_folder_is_verified(hub: FakeHub, run_command, tmp_path):
    out = tmp_path / "model"
    run_command(fetch_model, NAME, "--out", out)
    hub.requests.clear()
    code, said = run_command(fetch_model, NAME, "--out", out)
    assert (code, hub.downloaded()) == (0, []) and "their checksums are right" in said
    (out / WEIGHTS).write_bytes(hub.files[WEIGHTS][:-1] + b"!")
    (out / "params.json").write_text("{}")
    (out / TOKENIZER).unlink()
    code, said = run_command(fetch_model, NAME, "--out", out)
    assert code == 1
    assert "params.json differs: 2 bytes, the hub has 11" in said
    assert f"{TOKENIZER} is missing" in said and f"{WEIGHTS} differs: 4,321 bytes" in said


def test_a_killed_download_continues_where_it_was(hub: FakeHub, tmp_path, run_command):
    hub.files[WEIGHTS] = random.Random(1).randbytes(LARGE)
    hub.stop_after = LARGE - 1000
    command = [sys.executable, "-m", "utils.fetch_model", NAME, "--out", str(tmp_path / "model")]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "model.incomplete"
    deadline = time.monotonic() + 120
    while not any(part.stat().st_size for part in folder.glob(f"{WEIGHTS}.*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    model, weights = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/{COMMIT}/"
    assert {path for _, path, _ in hub.requests} == {model, *(weights + name for name in READ)}  # and nothing else
    assert not (tmp_path / "model").exists()
    [part] = folder.glob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < LARGE

    hub.stop_after = None
    hub.requests.clear()
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 0, said
    assert hub.downloaded() == [(WEIGHTS, f"bytes={kept}-")]
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert "are here already" in said and not folder.exists()


def test_a_lost_connection_keeps_what_was_downloaded(hub: FakeHub, run_command, tmp_path, monkeypatch):
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # between its attempts
    hub.files[WEIGHTS] = random.Random(1).randbytes(LARGE)
    hub.drop_after = LARGE - 1000
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and f"{hub.url} cannot be reached: " in said and "Run the command again to continue" in said
    [part] = (tmp_path / "model.incomplete").glob(f"{WEIGHTS}.*.part")
    kept = part.stat().st_size
    hub.drop_after = None
    hub.requests.clear()
    assert run_command(fetch_model, NAME, "--out", tmp_path / "model")[0] == 0
    assert hub.downloaded() == [(WEIGHTS, f"bytes={kept}-")]


@pytest.mark.parametrize("name", [WEIGHTS, "params.json"])
def test_a_wrong_checksum_is_refused_and_downloaded_again(name, hub: FakeHub, run_command, tmp_path):
    hub.forged = {name}
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and f"{name} of {REPOSITORY} does not have the checksum that the hub states" in said
    assert not (tmp_path / "model").exists()
    hub.forged = set()
    assert run_command(fetch_model, NAME, "--out", tmp_path / "model")[0] == 0
    assert (tmp_path / "model" / name).read_bytes() == hub.files[name]


@pytest.mark.parametrize("token", [None, "hf_abc"])
def test_a_gated_model_is_explained(token, hub: FakeHub, run_command, tmp_path, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.errors[f"/{REPOSITORY}/resolve"] = (403 if token else 401, "GatedRepo")
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and f"{REPOSITORY} is gated: its license must be accepted once." in said
    assert ("No token is set." in said) == (token is None)
    assert f"https://huggingface.co/{REPOSITORY}" in said and "hf auth login" in said
    assert token is None or token not in said


@pytest.mark.parametrize(
    ("status", "error_code", "sentence"),
    [
        (404, "RepoNotFound", "has no repository mistralai/Mistral-7B-v0.3, or it is private"),
        (401, "RepoNotFound", "has no repository"),
        (401, "", "is not valid: create another one"),
        (403, "", "create one with more permissions"),
        (500, "", "answers with 500"),
        (429, "", "answers with 429"),
    ],
)
def test_answers_that_refuse_end_in_one_message(status, error_code, sentence, hub: FakeHub, run_command, tmp_path):
    hub.errors["/api/models"] = (status, error_code)
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and sentence in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_token_with_an_impossible_character_is_not_quoted(hub: FakeHub, run_command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and "has a character that no token has: copy it again" in said
    assert "xe9" not in said and "é" not in said


def assert_manual_way(said: str) -> None:
    assert "hf download mistralai/Mistral-7B-v0.3 params.json consolidated.safetensors tokenizer.model.v3" in said
    assert "wget -c https://models.mistralcdn.com/mistral-7b-v0-3/mistral-7B-v0.3.tar" in said
    assert "echo '0663b293810d7571dad25dae2f2a5806  mistral-7B-v0.3.tar' | md5sum -c" in said


def test_without_a_connection_the_manual_way_is_printed(hub: FakeHub, run_command, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and said.startswith("error: http://127.0.0.1:9 cannot be reached: ")
    assert_manual_way(said)


def test_offline_mode_is_respected(hub: FakeHub, run_command, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and hub.requests == []
    assert_manual_way(said)


def test_a_disk_that_is_too_small_is_noticed_before(hub: FakeHub, run_command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4000))
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "new" / "model")
    assert code == 1 and f"{tmp_path} has 0.0 MB of free space" in said
    assert hub.downloaded() == [] and list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_keeps_what_was_downloaded(hub: FakeHub, run_command, tmp_path, monkeypatch):
    import errno

    import huggingface_hub.file_download

    original = huggingface_hub.file_download.http_get

    def full(url, target, **options):
        if url.endswith(WEIGHTS):
            target.write(hub.files[WEIGHTS][:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(url, target, **options)

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and "model cannot be written: No space left on device. Free some space" in said
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", original)
    assert run_command(fetch_model, NAME, "--out", tmp_path / "model")[0] == 0
    assert hub.downloaded()[-1] == (WEIGHTS, "bytes=100-")


def test_names(hub: FakeHub, run_command, tmp_path):
    code, said = run_command(fetch_model, "mistral-7b-0.3", "--out", tmp_path / "model")
    assert code == 1 and "is not a known model; did you mean mistral-7b-v0.3" in said
    code, said = run_command(fetch_model, "mixtral-8x22b-v0.3", "--out", tmp_path / "model")
    assert code == 1 and "only in an archive" in said and "a2fa75117174f87d1197e3a4eb50371a" in said
    code, said = run_command(fetch_model, "someone/French-7B", "--out", tmp_path / "model")
    assert code == 0, said
    assert hub.requests[0][1] == "/api/models/someone/French-7B"
    (tmp_path / "file").touch()
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "file")
    assert code == 1 and "is a file; name a folder" in said


def test_without_the_library_the_extra_is_named(run_command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, said = run_command(fetch_model, NAME, "--out", tmp_path / "model")
    assert code == 1 and "pip install 'recode-mistral-finetune[hub]'" in said


def chosen(*names: str) -> set[str]:
    return {file.name for file in choose_files("owner/name", [RemoteFile(name, 1, None, "") for name in names])}


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_files_of_each_layout():
    index, others = "model.safetensors.index.json", ["README.md", "pytorch_model.bin", "sub/params.json"]
    settings = ["tokenizer_config.json", "special_tokens_map.json"]
    folder = ["config.json", "tokenizer.model", index, *settings, *SHARDS]
    assert chosen(*folder, *others, "tokenizer.json") == set(folder)
    mistral = ["params.json", "tekken.json", "consolidated-00001-of-00001.safetensors"]
    assert chosen(*mistral, *folder) == set(mistral)
    assert chosen("params.json", "tokenizer.model", "tokenizer.model.v3", WEIGHTS) == READ
    with pytest.raises(UserError, match=re.escape("owner/name has no weights that are read")):
        chosen("config.json", "tokenizer.model", "pytorch_model.bin")
    with pytest.raises(UserError, match="has no tokenizer that is read"):
        chosen("config.json", "tokenizer.json", *SHARDS)


def test_checksums_are_those_of_mistral_finetune():
    md5s = {name: release.archive.md5 for name, release in RELEASES.items() if release.archive}
    assert (
        md5s.items()
        >= {
            "mistral-7b-v0.3": "0663b293810d7571dad25dae2f2a5806",
            "mistral-7b-instruct-v0.3": "80b71fcb6416085bcb4efad86dfb4d52",
            "mixtral-8x7b-instruct-v0.1": "8e2d3930145dc43d3084396f49d38a3f",
            "mixtral-8x22b-instruct-v0.3": "471a02a6902706a2f1e44a693813855b",
            "mixtral-8x22b-v0.3": "a2fa75117174f87d1197e3a4eb50371a",
            "nemo-12b-instruct-2407": "296fbdf911cb88e6f0be74cd04827fe7",
            "nemo-12b-base-2407": "c5d079ac4b55fc1ae35f51f0a3c0eb83",
        }.items()
    )


def test_the_table_of_models_is_current():
    assert PAGE.read_text(encoding="utf-8") == models_page(), "run `make docs`"
    assert all(f"| `{name}` |" in models_page() for name in RELEASES)


@pytest.mark.parametrize("name", RELEASES)
def test_every_model_of_the_table_can_be_planned(name):
    assert known_shapes(name) == KNOWN_MODELS[RELEASES[name].shapes]


def test_a_plan_by_name_says_how_to_download(tmp_path, run_command):
    (tmp_path / "config.yaml").write_text("{model_id_or_path: '', run_dir: x, data: {instruct_data: x}}")
    code, said = run_command(plan, tmp_path / "config.yaml", "--model", "nemo-12b-instruct-2407")
    assert code == 0, said
    assert "Download: 24.5 GB, license Apache-2.0: python -m utils.fetch_model nemo-12b-instruct-2407 --out DIR" in said
