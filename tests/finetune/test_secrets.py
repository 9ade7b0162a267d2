"""Secrets of the configuration and the environment are never printed, logged or written to a run folder."""

import base64
import json
import logging
import subprocess
from pathlib import Path

import pytest
import yaml

import train
from finetune import redaction
from finetune.args import TrainArgs, load_train_args
from finetune.data.args import DataArgs
from finetune.monitoring.args import MLFlowArgs
from finetune.monitoring.trackers import describe
from finetune.monitoring.utils import LineFormatter
from finetune.run_dir import create_run_dir
from model.errors import UserError
from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.forked import run_forked
from tests.support.run_trajectories import short_run

YAML_KEY = "y4mlk3y" * 6
ENVIRONMENT = {
    "WANDB_API_KEY": "w4ndbk3y" * 5,
    "HF_TOKEN": "hf_t0k3n" * 4,
    "HUGGING_FACE_HUB_TOKEN": "hf_0ldt0k3n" * 3,
    "MISTRAL_API_KEY": "m1str4lk3y" * 3,
    "MLFLOW_TRACKING_PASSWORD": "mlfl0wp4ss" * 2,
}
SECRETS = [YAML_KEY, *ENVIRONMENT.values()]
ROW = {"messages": [{"role": "user", "content": "Motif ?"}, {"role": "assistant", "content": "I10"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), **SMALL)


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> dict:
    trackers = {"wandb": {"project": "icd", "offline": True, "key": YAML_KEY}}
    return short_run(tmp_path, model, [json.dumps(ROW)] * 4) | {"no_eval": False} | trackers


def run_train(folder: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in a forked process in `folder`, as `python -m train` does."""
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    paths = {"HOME": str(folder), "TMPDIR": str(folder)}
    return run_forked(train, "config.yaml", folder=folder, environment=ENVIRONMENT | paths | environment)


def spellings(secret: str) -> list[bytes]:
    return [secret.encode(), secret[:24].encode(), base64.b64encode(f"api:{secret}".encode())]


def assert_no_secret(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """Assert that no secret is in the output or in any file except the configuration."""
    contents = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "config.yaml":
            contents[str(path)] = path.read_bytes() + path.name.encode()
    for secret in SECRETS:
        for where, content in contents.items():
            assert not any(spelling in content for spelling in spellings(secret)), f"{secret} is in {where}"


@pytest.mark.slow
def test_run_does_not_show_secrets(tmp_path: Path, settings: dict):
    """Failures of wandb's server are tested in tests/finetune/test_monitoring.py."""
    done = run_train(tmp_path, yaml.safe_dump(settings))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb")), "wandb recorded nothing"
    assert list(tmp_path.glob("run/checkpoints/*/consolidated/lora.safetensors"))
    assert_no_secret(done, tmp_path)


@pytest.mark.slow
def test_traceback_with_secrets_is_redacted(tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch):
    """A traceback of two exceptions and a log line, all of which quote every secret."""

    def train_step(*args: object) -> None:
        logging.getLogger("train").error("keys: %s", SECRETS)
        try:
            raise ValueError(" ".join(SECRETS))
        except ValueError as error:
            logging.getLogger("train").exception("no step")
            raise RuntimeError("-".join(SECRETS)) from error

    monkeypatch.setattr(train, "train_step", train_step)
    report = tmp_path / "error.json"
    settings["wandb"]["project"] = ""
    done = run_train(tmp_path, yaml.safe_dump(settings), TORCHELASTIC_ERROR_FILE=str(report))
    assert done.returncode != 0 and "RuntimeError: ***-***" in done.stderr and "Traceback" in done.stderr
    assert "keys: ['***'" in done.stdout and "ValueError: *** ***" in done.stdout
    assert "RuntimeError: ***" in report.read_text(encoding="utf-8")
    assert_no_secret(done, tmp_path)


GOOD = f"""
data: {{instruct_data: train.jsonl}}
model_id_or_path: model
run_dir: run
wandb:
  project: icd
  offline: true
  key: {YAML_KEY}
"""
MISTAKES = {
    "no space after key:": GOOD.replace("key: ", "key:"),
    "no colon": GOOD.replace("key: ", "key "),
    "wrong indentation": GOOD.replace("  key: ", "    key: "),
    "a tab": GOOD.replace("  key: ", "\tkey: "),
    "an unclosed quote": GOOD.replace("key: ", 'key: "'),
    "an unclosed bracket": GOOD.replace("key: ", "key: ["),
    "a list": GOOD.replace("key: ", "key:\n  - "),
    "a block": GOOD.replace("key: ", "key:\n    value: "),
    "inside another key": GOOD.replace("project: icd", "project:").replace("  key: ", "    key: "),
    "twice": GOOD + f"  key: {YAML_KEY}\n",
    "twice, dotted": GOOD + f"wandb.key: {YAML_KEY}\n",
    "another name": GOOD.replace("key: ", "keyy: "),
    "an unknown name": GOOD.replace("key: ", "token: "),
    "the key as a name": GOOD.replace("key: ", "") + "  ",
    "the key as a name with a value": GOOD.replace(f"key: {YAML_KEY}", f"{YAML_KEY}: key"),
    "wandb is the key": GOOD.partition("wandb:")[0] + f"wandb: {YAML_KEY}\n",
    "wandb is a list": GOOD.partition("wandb:")[0] + f"wandb: [key, {YAML_KEY}]\n",
    "one line": GOOD.partition("wandb:")[0] + f"wandb: {{project: icd, key:{YAML_KEY}}}\n",
    "a tag": GOOD.replace("key: ", "key: !!python/name:os.system "),
    "a number's tag": GOOD.replace("key: ", "key: !!int "),
    "a control character": GOOD.replace(YAML_KEY, f"{YAML_KEY}\x07"),
    "Latin-1": GOOD.replace(YAML_KEY, f"{YAML_KEY}\udce9"),
    "an invalid setting next to it": GOOD + "seq_len: none\n",
    "an invalid path": GOOD.replace("train.jsonl", f"{ENVIRONMENT['HF_TOKEN']}.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_near_the_key_does_not_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], settings: dict, name: str
):
    monkeypatch.chdir(tmp_path)
    for variable, secret in ENVIRONMENT.items():
        monkeypatch.setenv(variable, secret)
    Path("config.yaml").write_bytes(MISTAKES[name].encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        load_train_args(Path("config.yaml"))
    message = str(error.value) if name != "an invalid path" else redaction.redacted(str(error.value))
    assert "config.yaml" in message
    assert not any(secret[:12] in message for secret in SECRETS), message
    assert not any(secret[:12] in "".join(capfd.readouterr()) for secret in SECRETS)


@pytest.mark.slow
def test_error_message_does_not_show_secrets_of_the_environment(tmp_path: Path, settings: dict):
    settings["data"]["instruct_data"] = f"https://user:{ENVIRONMENT['HF_TOKEN']}@huggingface.co/train.jsonl"
    done = run_train(tmp_path, yaml.safe_dump(settings))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "***" in done.stderr
    assert_no_secret(done, tmp_path)


def test_error_is_redacted_before_it_is_truncated(monkeypatch: pytest.MonkeyPatch):
    secret = ENVIRONMENT["WANDB_API_KEY"]
    monkeypatch.setenv("WANDB_API_KEY", secret)
    for length in range(150, 210):
        assert secret[:8] not in describe(ValueError("x" * length + " " + secret))


def test_short_words_are_not_redacted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redaction.redacted("a word") == "a word"
    monkeypatch.setenv("HF_TOKEN", "longer-token")
    assert redaction.redacted({"a": ["a longer-token"]}) == {"a": ["a ***"]}


def test_log_lines_are_redacted_with_their_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    record = logging.makeLogRecord({"msg": "token %s", "args": (ENVIRONMENT["HF_TOKEN"],), "rank_prefix": ""})
    assert LineFormatter().format(record).endswith("token ***")


# ---- User info in URLs

PASSWORD = "S3cretPassw0rd"
URLS = {
    "http://bob:S3cretPassw0rd@127.0.0.1:9/": "http://127.0.0.1:9/",
    "https://bob:S3cretPassw0rd@host/path?a=b": "https://host/path?a=b",
    "http://S3cretPassw0rd@host": "http://host",
    "http://:S3cretPassw0rd@host": "http://host",
    "postgresql+psycopg2://bob:S3cretPassw0rd@db:5432/mlflow": "postgresql+psycopg2://db:5432/mlflow",
    "http://bob:S3cretPassw0rd@and@host:80/": "http://host:80/",
    "http://bob:a/S3cretPassw0rd@host:80/": "http://host:80/",
    "http://bob:S3cretPassw0rd#@[::1]:80/": "http://[::1]:80/",
}
OTHER_TEXTS = [
    "http://localhost:5000",
    "sqlite:///mlflow.db",
    "runs/me@home",
    "file:///home/me@home/x",
    "a:b@c",
    "@",
    "",
]


@pytest.mark.parametrize("url", URLS)
def test_user_info_is_cut_out_of_urls(url: str):
    assert redaction.without_user_info({"a": [url], "b": 3}) == {"a": [URLS[url]], "b": 3}
    message = redaction.redacted(f"Connection to {url} failed: '{url}', {url}.", secrets=())
    assert PASSWORD not in message and "://***@" in message and message.startswith("Connection to ")


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_texts_without_user_info_stay(text: str):
    assert redaction.without_user_info(text) == redaction.redacted(text, secrets=()) == text


@pytest.mark.parametrize("url", URLS)
def test_tracker_gets_the_password_and_no_file_does(tmp_path: Path, url: str):
    args = TrainArgs(DataArgs(), "model", str(tmp_path / "run"), mlflow=MLFlowArgs(url))
    assert args.mlflow.tracking_uri == url
    create_run_dir(tmp_path / "run", args)
    written = (tmp_path / "run" / "args.yaml").read_text(encoding="utf-8")
    assert PASSWORD not in written and PASSWORD not in repr(args) and URLS[url] in written
    assert args.to_dict()["mlflow"]["tracking_uri"] == URLS[url]


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "https_proxy", "HTTP_PROXY", "ALL_PROXY", "WANDB_BASE_URL"])
def test_password_in_a_url_of_the_environment_is_redacted(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "http://bob:S3cret%2FPassw0rd@proxy:3128")
    header = base64.b64encode(b"bob:S3cret/Passw0rd").decode()
    for quoted in ("S3cret%2FPassw0rd", "S3cret/Passw0rd", f"Basic {header}"):
        assert "***" in redaction.redacted(f"Proxy said no to {quoted}.") and quoted not in redaction.redacted(quoted)


@pytest.mark.parametrize("value", ["[http://bob:S3cretPassw0rd@host]", "{url: http://bob:S3cretPassw0rd@host}"])
@pytest.mark.parametrize("key", ["mlflow", "mlflow.tracking_uri", "max_norm", "resume"])
def test_message_about_a_setting_does_not_show_a_password(tmp_path: Path, settings: dict, key: str, value: str):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"wandb": {}}) + f"{key}: {value}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_train_args(config)
    assert PASSWORD not in redaction.redacted(str(error.value)) and key.split(".")[0] in str(error.value)


def test_tracking_uri_with_a_space_is_refused():
    [problem] = MLFlowArgs("http://bob:two words@host").problems()
    assert problem.message == "`mlflow.tracking_uri` contains a space; write %20 for a space in a password."
