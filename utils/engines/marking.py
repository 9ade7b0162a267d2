"""Give answered rows their confidence, and decide which stays need no reading."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.next_commands import aligned, shell_command
from finetune.run_dir import run_of
from model.errors import UserError
from model.wording import counted
from utils.engines.choice import EngineChoice
from utils.icd10.calibration import AUTO, CONDITIONS, FEWEST, AutoRule, Calibration
from utils.icd10.predictions import NOTHING_MORE
from utils.icd10.rules import guide_rules
from utils.tables.jsonl import Row

_WORDS = {"cim10": "codes (--cim10)", "rules": "coding rules (--rules)", "sampling": "sampling"}  # of CONDITIONS


class Marker:
    """Writes `confidence` next to each `probability`, and `decision` and its `reason` into rows of answers.

    Rows can be marked again, with another calibration or target.

    Args:
        calibration: None leaves the probabilities as they are.
        rule: which stays are `auto`; None for no decisions.

    Attributes:
        decisions: number of stays by decision.
    """

    def __init__(self, calibration: Calibration | None = None, rule: AutoRule | None = None) -> None:
        self._calibration = calibration
        self._rule = rule
        self.decisions: Counter[str] = Counter()

    def mark(self, row: Row) -> Row:
        """Return a row of answers with what is known about its codes."""
        # A person may have replaced codes by others, as text.
        codes = [
            self._confident(str(item.get("role")), item) if isinstance(item, dict) else item for item in row["codes"]
        ]
        marked = row | {"codes": codes}
        if NOTHING_MORE in row:
            marked[NOTHING_MORE] = self._confident(NOTHING_MORE, row[NOTHING_MORE])
        marked = {key: value for key, value in marked.items() if key not in ("decision", "reason")}
        if self._rule is None:
            return marked
        mains = [item.get("confidence") for item in codes if isinstance(item, dict) and item.get("role") == "DP"]
        decision, reason = self._rule.decide(mains[0] if len(mains) == 1 else None)
        self.decisions[decision] += 1
        return marked | {"decision": decision, "reason": reason}

    def _confident(self, role: str, item: dict[str, Any]) -> dict[str, Any]:
        chance = item.get("probability")
        if chance is None:
            return item
        return item | {"confidence": self._calibration.confidence(role, chance) if self._calibration else chance}

    def was_fitted_to(self, notes: Any) -> bool:
        """Return whether the calibration was fitted to the answers to notes, by the hash of their file."""
        return (
            self._calibration is not None and notes is not None and self._calibration.conditions.get("notes") == notes
        )

    def record(self) -> dict[str, Any]:
        """Return what the record of the answers says about their marks."""
        record: dict[str, Any] = {"calibrated": self._calibration is not None}
        if self._rule is not None:
            auto = self.decisions[AUTO]
            interval = self._rule.interval(auto) if auto else None
            record["auto"] = self._rule._asdict() | {"marked": auto, "accuracy_interval": interval}
        return record

    def reference(self) -> dict[str, float]:
        """Return what is known of the validation stays: mean `confidence` of the DP, share `right` and `to_review`."""
        if self._calibration is None or not self._calibration.main_diagnoses:
            return {}
        pairs = [(self._calibration.confidence("DP", p), right) for p, right in self._calibration.main_diagnoses]
        means = {"confidence": sum(p for p, _ in pairs) / len(pairs), "right": sum(r for _, r in pairs) / len(pairs)}
        return means if self._rule is None else means | {"to_review": 1 - self._rule.stays / self._rule.validation}

    def summary(self) -> str:
        """Return how many stays are `auto`, and how many of their main diagnoses are expected to be right."""
        auto, stays = self.decisions[AUTO], counted(self.decisions.total(), "stay")
        if self._rule is None or not auto:
            return f"auto: 0 of {stays}"
        low, high = self._rule.interval(auto)
        known = f"{self._rule.correct:,} of {counted(self._rule.stays, 'validation stay')}"
        return (
            f"auto: {auto:,} of {stays}, with a DP confidence from {self._rule.threshold:.3f}; "
            f"expected accuracy of their DP: {low:.1%} to {high:.1%} (95 % prediction interval, from {known})"
        )


def calibration_path(checkpoint: Path) -> Path | None:
    """Return where the calibration of a checkpoint is stored with its run; None if it is not in one."""
    run_dir = run_of(checkpoint)
    return run_dir / "calibration" / f"{checkpoint.resolve().name}.json" if run_dir else None


def _how_to_calibrate(choice: EngineChoice, given: Path | None) -> str:
    """Return the commands that calibrate a choice, with capitals in place of what it does not know."""
    answers, stored = "VAL_PREDICTIONS.jsonl", calibration_path(choice.folder) if choice.folder else None
    run = ("--run", choice.folder) if choice.folder else ()
    predict: list[str | Path] = ["utils.predict_icd10", *run, "--notes", "VAL.jsonl", "--out", answers]
    predict += ["--cim10", "TABLE"] if choice.table is not None else []
    predict += ["--rules", "RULES"] if choice.rules.digest != guide_rules().digest else []
    calibrate: list[str | Path] = ["utils.calibrate_icd10", "--gold", "VAL.jsonl", "--predictions", answers]
    calibrate += ["--out", given or "CALIBRATION.json"] if given or not stored else []
    return "Answer validation notes with the options of this command, and calibrate:\n" + "\n".join(
        aligned({"answer": shell_command(predict), "calibrate": shell_command(calibrate)})
    )


def open_marker(choice: EngineChoice, given: Path | None = None, target: float | None = None) -> Marker:
    """Return the marker of an engine's answers.

    Args:
        choice: the engine and its settings.
        given: a calibration file; None for that of the run, if there is one.
        target: share of right main diagnoses among the `auto` stays; None for no decisions.

    Raises:
        UserError: `target` is out of range, or the calibration cannot be used, or is missing while `target` is given.
    """
    if target is not None and not 0 < target < 1:
        raise UserError("--auto must be above 0 and below 1, such as 0.98 for 98 % right main diagnoses.")
    stored = calibration_path(choice.folder) if choice.folder else None
    path = given or (stored if stored and stored.is_file() else None)
    calibration = Calibration.from_file(path) if path else None
    identity = choice.identity()
    if calibration and (different := [key for key in CONDITIONS if calibration.conditions.get(key) != identity[key]]):
        reason = f"{path} was fitted to answers with different {', '.join(_WORDS[key] for key in different)}"
        if given or target is not None:
            raise UserError(f"{reason}. {_how_to_calibrate(choice, given)}")
        print(f"warning: {reason}, and is not used. {_how_to_calibrate(choice, given)}", file=sys.stderr)
        calibration = None
    if given and calibration and not _is_of_model(calibration, identity):
        print(
            f"warning: {given} was fitted to answers of another model, or of a copy of this one: no other is right.",
            file=sys.stderr,
        )
    if target is None:
        return Marker(calibration)
    if calibration is None:
        raise UserError(f"--auto needs a calibration. {_how_to_calibrate(choice, given)}")
    if "DP" not in calibration.maps:
        raise UserError(
            f"--auto needs a calibrated DP, and {path} has too few validation stays for it "
            f"({len(calibration.main_diagnoses)}): calibrate with at least {FEWEST} main diagnoses."
        )
    return Marker(calibration, calibration.auto_rule(target))


def _is_of_model(calibration: Calibration, identity: dict[str, Any]) -> bool:
    return all(calibration.conditions.get(key) in (None, identity[key]) for key in ("run", "model"))
