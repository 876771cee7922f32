"""configs/tldr.py from its first line to the report, on tiny models of the same families and a small data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sea_jax.models.checkpoints import tiny_random

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 600

SMALL = (
    "max_queries=16",
    "data.batch_size=8",
    "data.bucket=64",
    "sampling.num_samples=4",
    "sampling.max_new_tokens=8",
    "sampling.batch_size=4",
    "exploration.burn_in_queries=8",
    "learner.learning_rate=1e-3",
    "learner.microbatch_size=4",
    "erm.num_heads=4",
    "erm.trunk_batch_size=8",
    "oracle.batch_size=8",
    "eval.every_queries=8",
    "eval.num_prompts=6",
    "eval.batch_size=8",
    "eval.max_new_tokens=12",
    "data.max_prompt_tokens=48",
)


def write_data(directory: Path) -> None:
    """Writes a data set with the fields and splits of the hub's: 12 short posts and 2 that are too long, and 7 held out."""
    (directory / "data").mkdir(parents=True)
    for split, count, long in (("train", 14, 2), ("test", 7, 0)):
        posts = [f"POST: {split} {'long ' * 20 * (row < long)}{row}\nTL;DR:" for row in range(count)]
        columns = {"prompt": posts, "pythia-1b-reference": [f" a summary of {row}" for row in range(count)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), directory / "data" / f"{split}-00000-of-00001.parquet")


def command(*flags: str, size: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sea_jax.train", f"--config=configs/tldr.py{size}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.slow
def test_the_papers_setting_runs_from_local_directories_to_the_report(tmp_path: Path) -> None:
    tiny_random.write(tmp_path / "pythia", "tiny-random-gpt-neox")
    tiny_random.write(tmp_path / "pairrm", "tiny-random-deberta", seed=1)
    tiny_random.write(
        tmp_path / "skywork", "tiny-random-llama-reward", seed=2, changes={"max_position_embeddings": 2048}
    )
    write_data(tmp_path / "tldr")
    workdir = tmp_path / "run"
    finished = command(
        f"--config.policy.source={tmp_path / 'pythia'}",
        f"--config.erm.trunk={tmp_path / 'pairrm'}",
        f"--config.oracle.reward_model={tmp_path / 'skywork'}",
        f"--config.data.path={tmp_path / 'tldr'}",
        f"--workdir={workdir}",
        *(f"--config.{setting}" for setting in SMALL),
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 of 14 prompts are over 48 tokens" in finished.stderr
    assert json.loads((workdir / "config.json").read_text())["mesh"] == [1, 2, 1]
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["misc/query_step"] == 16
    assert 0 <= last["eval/rm_win_rate_low"] <= last["eval/rm_win_rate"] <= last["eval/rm_win_rate_high"] <= 1
    assert 0 <= last["eval/rm_reference_win_rate"] <= 1
    assert "win rate" in finished.stdout
    assert (workdir / "report.md").exists()
    assert (workdir / "win_rate.png").exists()


def test_without_the_hub_one_error_says_what_is_missing_and_how_to_name_copies(tmp_path: Path) -> None:
    finished = command(f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    for field, name in (
        ("policy.source", "trl-lib/pythia-1b-deduped-tldr-sft"),
        ("erm.trunk", "llm-blender/PairRM-hf"),
        ("oracle.reward_model", "Skywork/Skywork-Reward-Llama-3.1-8B"),
    ):
        assert f"config.{field}={name}: " in finished.stderr
        assert f"--config.{field}=DIRECTORY" in finished.stderr
    assert "config.data.path=lkevinzc/tldr-with-sft-reference: " in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_size_that_there_is_not_is_one_error(tmp_path: Path) -> None:
    finished = command(f"--workdir={tmp_path / 'run'}", size=":7b")
    assert finished.returncode == 1
    assert "configs/tldr.py:7b: the sizes are 1b, 2.8b, 6.9b" in finished.stderr
    assert "Traceback" not in finished.stderr
