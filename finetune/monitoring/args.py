"""The blocks of experiment trackers."""

import dataclasses
import importlib.util

from finetune.redaction import add_secret, add_url_secrets
from model.errors import Problem
from model.settings import Bool, PositiveInt, Settings, Str


@dataclasses.dataclass
class WandbArgs(Settings):
    """Tracking with Weights & Biases. An empty string means unset, as in mistral-finetune's example YAMLs."""

    project: Str | None = None  # project name; unset: wandb is neither imported nor contacted
    offline: Bool = False  # record under `run_dir`/wandb, to upload later with `wandb sync`
    run_name: Str | None = None  # name of the run; unset: that of the run folder
    # seconds to wait for the server: when training starts, after which the run is recorded offline; and when it ends,
    # after which what has not been uploaded stays in `run_dir`/wandb
    timeout: PositiveInt = 30
    # API key; unset: the environment variable WANDB_API_KEY or an earlier `wandb login`. Never written to args.yaml
    key: Str | None = dataclasses.field(default=None, repr=False, metadata={"to_dict": False})

    def __post_init__(self) -> None:
        self.project = self.project or None
        self.run_name = self.run_name or None
        self.key = (self.key or "").strip() or None
        if self.key:
            add_secret(self.key)

    def problems(self) -> list[Problem]:
        return _missing_package("wandb", "wandb.project") if self.project else []


@dataclasses.dataclass
class MLFlowArgs(Settings):
    """Tracking with MLflow. An empty string means unset."""

    # where to record, such as http://localhost:5000 or sqlite:///mlflow.db; unset: MLflow is not used. A user name and
    # password in it are never written anywhere
    tracking_uri: Str | None = dataclasses.field(default=None, repr=False)
    experiment_name: Str | None = None  # name of the experiment; unset: MLflow's default experiment
    # seconds to wait for the server before training continues without it
    timeout: PositiveInt = 30

    def __post_init__(self) -> None:
        self.tracking_uri = self.tracking_uri or None
        add_url_secrets(self.tracking_uri or "")
        self.experiment_name = self.experiment_name or None

    def problems(self) -> list[Problem]:
        if self.tracking_uri and any(map(str.isspace, self.tracking_uri)):
            message = "`mlflow.tracking_uri` contains a space; write %20 for a space in a password."
            return [Problem("mlflow.tracking_uri", message)]
        return _missing_package("mlflow", "mlflow.tracking_uri") if self.tracking_uri else []


def _missing_package(package: str, key: str) -> list[Problem]:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory (wandb creates one) is found, too, but has no file to import.
    if spec is not None and spec.origin is not None:
        return []
    install = f'`pip install -e ".[{package}]"`'
    return [Problem(key, f"`{key}` is set but {package} is not installed: run {install}, or leave `{key}` empty.")]
