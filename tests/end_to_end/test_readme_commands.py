"""Every command of README.md and docs/ runs on tiny models and data, or is listed with the reason why not."""

import inspect
import json
import re
import shlex
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import SMALL, make_tiny_checkpoint
from tests.support.documents import COMMANDS, ROOT, TEXT, command_starting_with, starts_with
from tests.support.in_turn import TORCHRUN, run_in_turn

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# What the placeholders of all commands mean.
PLACES = {
    "CIM10_TABLE": "notes/cim10.tsv",
    "CONFIG.yaml": "small.yaml",
    "RUN": "runs/icd_v1",
    "MODEL": "models/mistral-7B-v0.3",
    "A": "models/mistral-7B-v0.3",
    "B": "runs/icd_v1",
    "text.csv": "notes/text.csv",
    "codes.csv": "notes/codes.csv",
}
# Commands in an order in which each finds its input: how they begin, and what else is replaced.
STORY: list[tuple[str, dict[str, str]]] = [
    ("python -m utils.make_demo_model", {"DIR": "models/mistral-7B-v0.3", "1500": "0"}),
    ("python -m utils.generate_notes", {"DIR": "notes", "1000": "40"}),
    ("python -m utils.prepare_icd10_data", {}),
    ("python -m utils.validate_data example", {}),
    ("python -m utils.plan example", {}),
    ("python -m utils.plan --help", {}),
    ("torchrun --nproc-per-node 1 -m train example", {}),
    ("python -m utils.predict_icd10 --run runs/icd_v1 --notes data/test_instruct.jsonl --out predictions", {}),
    ("python -m utils.predict_icd10 --run runs/icd_v1 --notes new_notes", {}),
    ("python -m utils.evaluate_icd10", {}),
    ("python -m train CONFIG.yaml", {}),
    ("python -m train CONFIG.yaml run_dir", {}),
    ("python -m train --help", {}),
    ("python -m utils.validate_data CONFIG", {}),
    ("torchrun --nnodes 2", {"2": "1", "8": "2", "HOST": "localhost", "29400": "PORT", "CONFIG.yaml": "two.yaml"}),
    ("python -m utils.reformat_data FILE", {"FILE": "chats"}),
    ("python -m utils.reformat_data_glaive", {"FILE": "glaive"}),
    ("python -m utils.import_data TABLE", {"TABLE": "questions.csv", "DIR": "questions"}),
    ("python -m utils.merge_lora", {"C": "merged"}),
    ("python -m utils.export RUN --to peft", {"DIR": "peft"}),
    ("python -m utils.export RUN --to hf", {"DIR": "hf"}),
    ("python -m utils.export RUN --to mistral", {"DIR": "mistral"}),
    ("python -m utils.export RUN --to gguf", {"DIR": "gguf"}),
    ("python -m utils.export MODEL", {"BASE": "base"}),
    ("python -m utils.extend_model_vocab", {"OLD": "old", "NEW": "new"}),
    ("python -m utils.report", {}),
    ("python -m utils.evaluate_qa", {"G.jsonl": "questions/eval.jsonl"}),
    ("python -m utils.compare_icd10", {"A.json": "scores.json", "B.json": "scores.json"}),
    # Their latest results; measuring takes minutes.
    *(
        (f"python -m benchmarks.{name}", {f"benchmarks.{name}": f"benchmarks.{name} --show"})
        for name in ("loader", "validate", "saving", "load_checkpoint", "plan")
    ),
]
# Commands that another test runs, or why none does.
ELSEWHERE = {
    "make demo": "test_readme.py::test_demo_writes_a_complete_run_folder",
    "make sample-data": "test_readme.py::test_sample_data_has_three_splits",
    "make notebooks": "test_notebooks.py::test_mistral_finetune_7b",
    "make kill-test": "test_resume.py::test_a_run_killed_at_any_time_resumes_with_identical_metrics",
    "make docs": "test_configuration_page.py::test_the_pages_are_current",
    "make setup": "test_project.py::test_setup_uses_the_constraints",
    "make test": "runs this test",
    "make test-oldest": "test_project.py::test_both_ends_of_the_supported_versions_are_documented",
    "torchrun --nproc-per-node 1 -m train CONFIG": "like python -m train CONFIG.yaml",
    "torchrun --nproc-per-node 8": "test_training.py::test_two_processes_follow_the_original",
    "torchrun --max-restarts 3": "test_resume.py::test_torchrun_restarts_a_run_that_lost_a_process",
    "sbatch": "test_machines.py::test_the_slurm_script_requeues_an_interrupted_run",
    "python -m benchmarks.train": "test_benchmark_train.py::test_the_paired_mode_ends_with_the_ratios",
    "python -m utils.chat": "test_chat.py::test_both_models_answer_as_they_do_in_predictions",
    "torchrun --nproc-per-node 4 -m utils.predict_icd10": "test_predict_icd10.py::test_shards_are_collected",
    "python -m utils.predict_icd10 --run runs/icd_v1 --notes notes": "test_predict_icd10.py::test_shards_are_collected",
    "python -m utils.predict_icd10 --run runs/icd_v1 --notes data": (
        "test_predict_icd10.py::test_codes_have_confidences_and_stays_decisions"
    ),
    "python -m utils.explain_icd10": "test_explain_icd10.py::test_documents_dates_and_marks_of_the_evidence",
    "python -m utils.calibrate_icd10": "test_icd10_confidence.py::test_calibrating_stores_the_result_with_the_run",
    "python -m utils.code_stays": "test_code_stays.py::test_reviews_are_kept_and_become_rows_to_train_on",
    "python -m tests.end_to_end.kill_worklist": "as test_code_stays.py does with fewer stays",
    "python -m utils.review_icd10": "test_review_icd10.py::test_decisions_are_counted_and_become_rows_to_train_on",
    "python -m utils.predict_icd10 --engine server": "test_serving.py::test_a_served_export_answers_as_we_do",
    "python -m utils.check_icd10": "test_check_icd10.py::test_the_checker_names_the_stays_that_break_rules",
    "python -m utils.plan": "test_plan.py::test_printed_plan",
    "python -m utils.reformat_data": "test_reformat.py::test_reformat_data_matches_the_original_and_keeps_tool_calls",
    "python -m docs.draw_images": "test_documentation_images.py::test_all_images_are_drawn",
    "python -m benchmarks.learning_curve": "test_documentation_images.py::test_a_point_of_the_learning_curve",
    "python -m benchmarks.learning_rate": "takes an hour",
    "python -m benchmarks.confidence": "takes an hour; its commands are those of test_icd10_confidence.py",
    "python -m benchmarks.evidence": "test_explain_icd10.py::test_effects_are_those_of_notes_without_a_sentence",
    "python -m benchmarks.moe_seeds": "takes an hour",
    "python -m benchmarks.trace": "test_trace.py",
    "python -m benchmarks.acceptance": "test_acceptance.py::test_every_check_passes_on_a_cpu",
    "make gpu-bundle": "test_gpu_bundle.py::test_the_bundle_has_what_a_run_reads_and_says_how_large_it_is",
    "export PYTHONPATH": "a shell builtin",
    "python -m benchmarks.fp16": "as test_documentation_images.py does with an untrained model",
    "python -m utils.import_data": "named without arguments",
    "python -m benchmarks.generate": "test_predict_icd10.py::test_constrained_answers_contain_only_codes_of_the_table",
    "python -m tests.end_to_end.two_nodes": "test_machines.py::test_a_restarted_node_finishes_the_run",
    "python -m tests.end_to_end.slurm_cluster": "installs a scheduler; its result is recorded",
    "python -m tests.end_to_end.same_answers": "test_export.py::test_transformers_computes_our_logits",
    "mistral-chat": "needs a GPU",
    "git clone": "needs the network",
    "cd recode": "a shell builtin",
    "hf": "needs the network",
    "python -m utils.fetch_model": "test_fetch_model.py::test_only_the_files_that_are_read_are_downloaded_and_verified",
    "wget": "needs the network",
    "echo '0663b293810d7571dad25dae2f2a5806": "needs the network",
    "mkdir -p models": "needs the network",
    "python3 -m venv": "creates an environment",
    ".venv/bin/python -m pip install": "installs packages",
    "source .venv/bin/activate": "a shell builtin",
    "pip install": "installs packages",
    "vllm": "another project's command",
    "ollama": "another project's command",
}


def with_places(command: str, places: dict[str, str]) -> list[str]:
    """Return a module and its arguments, with placeholders replaced."""
    places = PLACES | places
    longest_first = sorted(places, key=len, reverse=True)
    words = "|".join(map(re.escape, longest_first))
    replaced = re.sub(rf"(?<![\w.])(?:{words})(?!\w)", lambda match: places[match[0]], command)
    path, *arguments = shlex.split(replaced)
    program = Path(path).name
    return [TORCHRUN, *arguments] if program == "torchrun" else arguments[1:]


def shrunken(config: Path, run_dir: str, **changes: object) -> str:
    """Return a 7B model's example as a run of two short steps."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings |= {"run_dir": run_dir, "seq_len": 1024, "num_microbatches": 1, "max_steps": 2}
    settings |= {"ckpt_freq": 1, "eval_freq": 2} | changes
    return yaml.safe_dump({key: value for key, value in settings.items() if value is not None})


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the commands on tiny models and data; `outcomes.json` in the folder has exit codes and outputs."""
    folder = tmp_path_factory.mktemp("story")
    shutil.copytree(ROOT / "example", folder / "example")
    config = folder / "example/instruct_icd_v1.yaml"
    more = {"base_dtype": "nf4", "checkpoint": "auto", "epochs": 0.2, "max_steps": None}
    files = {
        "small.yaml": shrunken(config, "runs/small", **more),
        "two.yaml": shrunken(config, "runs/two", sharding="hybrid"),
        "example/instruct_icd_v1.yaml": shrunken(config, "runs/icd_v1"),
        "new_notes.csv": "visit_occurence_id,text\n1,Patient hospitalisé pour une pneumopathie.\n",
        "questions.csv": "question,answer\n" + "".join(f"What is {n} and 1?,{n + 1}\n" for n in range(20)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, file in (("chats", "reformat_data"), ("glaive", "glaive")):  # their first rows can be converted
        rows = (ROOT / f"tests/fixtures/reformat/{file}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text(rows[0], encoding="utf-8")
    make_tiny_checkpoint(folder / "old", **SMALL | {"vocab_size": 32000})
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    steps = {}
    for beginning, places in STORY:
        command = command_starting_with(beginning)
        steps[command] = [word.replace("PORT", port) for word in with_places(command, places)]
    outcomes = run_in_turn(steps, folder, loopback=True)
    (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")
    return folder


def test_every_command_runs_or_is_listed() -> None:
    beginnings = [*(beginning for beginning, _ in STORY), *ELSEWHERE]
    for command in COMMANDS:
        assert any(starts_with(command, beginning) for beginning in beginnings), command
    for beginning in ELSEWHERE:
        assert any(starts_with(command, beginning) for command in COMMANDS), beginning


@pytest.mark.parametrize("beginning", [beginning for beginning, _ in STORY])
def test_commands_run(beginning: str, story: Path) -> None:
    outcomes = json.loads((story / "outcomes.json").read_text(encoding="utf-8"))
    code, output = outcomes[command_starting_with(beginning)]
    assert code == 0, output[-3000:]


def test_commands_connect_to_no_other_host(story: Path) -> None:
    assert not (story / "sockets.txt").exists(), (story / "sockets.txt").read_text(encoding="utf-8")


def test_commands_write_the_documented_files(story: Path) -> None:
    checkpoint = story / "runs/icd_v1/checkpoints/last"
    expected = {"lora.safetensors", "params.json", "tokenizer.model.v3"}
    assert {path.name for path in (checkpoint / "consolidated").iterdir()} == expected
    assert (checkpoint / "manifest.json").is_file() and (checkpoint / "state").is_dir()
    assert json.loads((story / "scores.json").read_text(encoding="utf-8"))["counts"]["missing_predictions"] == 0
    files = [
        "new_codes.csv",
        "base/config.json",
        "scores.html",
        "report.html",
        "questions/train.jsonl",
        "new/params.json",
        "peft/adapter_config.json",
    ]
    files += ["hf/config.json", "hf/tokenizer.model.v3", "mistral/params.json", "merged/consolidated.safetensors"]
    assert [name for name in files if not (story / name).is_file()] == []


@pytest.mark.parametrize("target", sorted({*re.findall(r"`make ([\w-]+)`", TEXT + CONTRIBUTING)}))
def test_make_knows_the_targets(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("extra", re.findall(r'`pip install -e "\.\[(\w+)\]"`', TEXT))
def test_extras_exist(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


def test_mistral_chat_has_these_flags() -> None:
    from mistral_inference.main import interactive

    flags = re.findall(r"--(\w+)", command_starting_with("mistral-chat"))
    assert {"instruct", "lora_path"} == set(flags) <= set(inspect.signature(interactive).parameters)
