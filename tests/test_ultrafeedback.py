"""configs/ultrafeedback.py: the paper's numbers, and a run from its first line to the report on tiny models and little data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from configs import ultrafeedback
from sea_jax import config as configuration
from sea_jax.models.checkpoints import tiny_random

ROOT = Path(__file__).parent.parent

GENERAL = {
    "policy.source": "meta-llama/Meta-Llama-3-8B-Instruct",
    "policy.dtype": "bfloat16",
    "data.chat": True,
    "data.reference_field": "",
    "data.max_prompt_tokens": 1800,
    "data.batch_size": 128,
    "loss.name": "simpo",
    "loss.beta": 10.0,
    "loss.gamma_over_beta": 0.3,
    "learner.learning_rate": 8e-7,
    "oracle.kind": "reward_model",
    "oracle.reward_model": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
    "oracle.flip_probability": 0.0,
    # "Configurations of SEA are kept the same as those in the TL;DR task."
    "max_queries": 50_000,
    "sampling.num_samples": 20,
    "sampling.temperature": 0.7,
    "exploration.rule": "bai_ts",
    "exploration.gamma": 0.7,
    "exploration.burn_in_queries": 1000,
    "erm.trunk": "llm-blender/PairRM-hf",
    "erm.num_heads": 20,
    "erm.hidden_size": 128,
    "erm.anchor_strength": 0.5,
    "learner.warmup_fraction": 0.03,
    "learner.final_fraction": 0.1,
    "learner.b1": 0.9,
    "learner.b2": 0.95,
    "learner.clip_norm": 1.0,
}

SMALLER = {  # App. G.4
    "policy.source": "meta-llama/Llama-3.2-1B-Instruct",
    "erm.trunk": "Skywork/Skywork-Reward-V2-Llama-3.2-1B",
    "erm.trunk_batch_size": 16,
    "loss.name": "dpo",
    "loss.beta": None,
    "loss.gamma_over_beta": None,
    "learner.learning_rate": 5e-7,
    "eval.num_prompts": 2000,
}

SMALL = (
    "max_queries=16",
    "data.batch_size=8",
    "data.bucket=128",
    "data.max_prompt_tokens=96",
    "sampling.num_samples=4",
    "sampling.max_new_tokens=8",
    "sampling.batch_size=4",
    "exploration.burn_in_queries=8",
    "learner.learning_rate=1e-3",
    "learner.microbatch_size=4",
    "erm.num_heads=4",
    "erm.trunk_batch_size=8",
    "oracle.batch_size=8",
    "eval.every_queries=16",
    "eval.num_prompts=4",
    "eval.likelihood_prompts=0",
    "eval.batch_size=4",
    "eval.max_new_tokens=8",
)


def test_the_numbers_are_the_papers() -> None:
    fields = {
        choice: configuration.flatten(ultrafeedback.get_config(choice).to_dict()) for choice in ultrafeedback.CHOICES
    }
    assert {name: fields["llama3"][name] for name in GENERAL} == GENERAL
    for choice, others in (("llama32-1b", {}), ("noise", {"oracle.flip_probability": 0.1})):
        differing = {name: value for name, value in fields[choice].items() if value != fields["llama3"][name]}
        assert differing == SMALLER | others | {"name": f"ultrafeedback-{choice}"}
        configuration.resolve(ultrafeedback.get_config(choice))
    assert configuration.resolve(ultrafeedback.get_config()) == configuration.resolve(
        ultrafeedback.get_config("llama3")
    )
    assert ultrafeedback.get_config("noise,online").method == "online"
    with pytest.raises(ValueError, match=r"^configs/ultrafeedback.py:llama2: there are llama3, llama32-1b, noise$"):
        ultrafeedback.get_config("llama2")


def command(*flags: str, choice: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sea_jax.train", f"--config=configs/ultrafeedback.py{choice}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_general_setting_runs_from_local_directories_to_the_report(tmp_path: Path) -> None:
    """With the trunk of App. G.4, a reward model that is a decoder; PairRM's is in the run of configs/tldr.py."""
    long = {"max_position_embeddings": 4096}
    tiny_random.write(tmp_path / "llama", "tiny-random-llama")
    told = tmp_path / "llama" / "tokenizer_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"chat_template": tiny_random.CHAT_TEMPLATE}))
    tiny_random.write(tmp_path / "skywork", "tiny-random-llama-reward", seed=1, changes=long)
    tiny_random.write(tmp_path / "armorm", "tiny-random-llama-gated", seed=2, changes=long)
    (tmp_path / "data" / "data").mkdir(parents=True)
    for split, count, long_ones in (("train_prefs", 14, 2), ("test_prefs", 7, 0)):
        prompts = [f"{split}: {'long ' * 20 * (row < long_ones)}what is {row}?" for row in range(count)]
        answered = [[{"role": "user", "content": p}, {"role": "assistant", "content": "a number"}] for p in prompts]
        table = pyarrow.table({"prompt": prompts, "prompt_id": prompts, "chosen": answered, "rejected": answered})
        pyarrow.parquet.write_table(table, tmp_path / "data" / "data" / f"{split}-00000-of-00001.parquet")
    workdir = tmp_path / "run"
    finished = command(
        f"--config.policy.source={tmp_path / 'llama'}",
        f"--config.erm.trunk={tmp_path / 'skywork'}",
        f"--config.oracle.reward_model={tmp_path / 'armorm'}",
        f"--config.data.path={tmp_path / 'data'}",
        f"--workdir={workdir}",
        *(f"--config.{setting}" for setting in SMALL),
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 of 14 prompts are over 96 tokens" in finished.stderr
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["misc/query_step"] == 16
    assert 0 <= last["eval/rm_win_rate_low"] <= last["eval/rm_win_rate"] <= last["eval/rm_win_rate_high"] <= 1
    assert (workdir / "report.md").exists()


def test_without_the_hub_one_error_says_what_is_missing_and_how_to_name_copies(tmp_path: Path) -> None:
    finished = command(f"--workdir={tmp_path / 'run'}", choice=":noise")
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    for field in ("policy.source", "erm.trunk", "oracle.reward_model"):
        assert (
            f"config.{field}={(SMALLER | {'oracle.reward_model': GENERAL['oracle.reward_model']})[field]}: "
            in finished.stderr
        )
        assert f"--config.{field}=DIRECTORY" in finished.stderr
    assert "config.data.path=HuggingFaceH4/ultrafeedback_binarized: " in finished.stderr
    assert not (tmp_path / "run").exists()
