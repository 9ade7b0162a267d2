"""What a YAML says about experiment trackers."""

import dataclasses
import importlib.util

from simple_parsing.helpers import Serializable, field

from finetune.redaction import add_secret
from model.errors import Problem


@dataclasses.dataclass
class WandbArgs(Serializable):
    """Weights & Biases; an empty string means unset, as the example YAMLs write it."""

    project: str | None = None  # unset: wandb is neither imported nor contacted
    offline: bool = False  # record under run_dir/wandb, to be uploaded later with `wandb sync`
    run_name: str | None = None  # unset: the run folder's name
    # Unset: WANDB_API_KEY or an earlier `wandb login`. Left out of to_dict(), so that it never reaches args.yaml.
    key: str | None = field(default=None, to_dict=False, repr=False)

    def __post_init__(self) -> None:
        self.project = self.project or None
        self.run_name = self.run_name or None
        self.key = (self.key or "").strip() or None
        if self.key:
            add_secret(self.key)

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        if self.project is None:
            return []
        return _missing_package("wandb", setting="wandb.project")


@dataclasses.dataclass
class MLFlowArgs(Serializable):
    """MLflow; an empty string means unset."""

    tracking_uri: str | None = None  # e.g. http://localhost:5000 or sqlite:///mlflow.db; unset: mlflow is not used
    experiment_name: str | None = None  # unset: MLflow's default experiment; read only with `tracking_uri`

    def __post_init__(self) -> None:
        self.tracking_uri = self.tracking_uri or None
        self.experiment_name = self.experiment_name or None

    def problems(self) -> list[Problem]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        if self.tracking_uri is None:
            return []
        return _missing_package("mlflow", setting="mlflow.tracking_uri")


def _missing_package(package: str, setting: str) -> list[Problem]:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory (wandb makes one) is found too, but without a file to import.
    if spec is not None and spec.origin is not None:
        return []
    message = (
        f"`{setting}` is set but the package {package} is not installed: run "
        f'`pip install -e ".[{package}]"`, or leave `{setting}` empty.'
    )
    return [Problem(setting, message)]
