"""AlpacaEval's instructions, and its own package on what we write; that package is skipped where it is not installed.

ALPACA_EVAL_PYTHON names an interpreter of another environment that has it, as it wants other versions than ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sea_jax.alpaca_eval import read_instructions
from sea_jax.statistics import length_controlled_win_rates

PYTHON = os.environ.get("ALPACA_EVAL_PYTHON", sys.executable)

PROGRAM = """
import json, sys
from alpaca_eval import evaluate, utils
from alpaca_eval.metrics import glm_winrate
annotations, gamed, outputs, references, judge = sys.argv[1:]
glm_winrate.hf_hub_download = lambda **file: gamed
found = {
    glm: glm_winrate.get_length_controlled_winrate(
        utils.load_or_convert_to_dataframe(annotations), glm_name=glm, save_weights_dir=None, is_warn_extreme_changes=False
    )["length_controlled_winrate"]
    for glm in ("length_controlled_minimal", "length_controlled_v1")
}
leaderboard, annotated = evaluate(
    model_outputs=outputs, reference_outputs=references, annotators_config=judge, output_path=None, caching_path=None,
    precomputed_leaderboard=None, is_return_instead_of_print=True, fn_metric="get_winrate", sort_by="win_rate",
)
found["leaderboard"] = leaderboard.to_dict(orient="index")
found["annotated"] = annotated
print("FOUND" + json.dumps(found, default=str))
"""


JUDGE = """  # says the same of every pair, and is not asked over the net
judge:
  prompt_template: judge/prompt.txt
  fn_completions: test_completions
  completions_kwargs: {value: m}
  completion_parser_kwargs: {outputs_to_match: {1: M, 2: m}}
"""


def annotations(count: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Made up, with a taste for length: P(the second wins) [N], and the lengths of the two outputs [N]."""
    draw = np.random.RandomState(0)  # whose numbers are the same for ever
    first = draw.randint(200, 2000, count)
    second = np.maximum(20, (first * np.exp(0.3 + 0.5 * draw.randn(count))).astype(int))
    logit = -0.8 + 1.2 * np.tanh((second - first) / 500) + draw.randn(count)
    return 1 / (1 + np.exp(-logit)), first, second


# What alpaca-eval 0.6.6 says of them, in per cent: its regression on length alone (length_controlled_minimal), and that of its
# leaderboard (length_controlled_v1) with the difficulties and the answers of models told to be wordy that are made up below.
LENGTH_ALONE, LEADERBOARD = 30.8872, 31.2672


def test_ours_is_the_packages_rate_at_equal_length() -> None:
    preference, first, second = annotations()
    (ours,) = length_controlled_win_rates(preference[None], (second - first)[None].astype(np.float64))
    assert 100 * preference.mean() - 100 * ours.mean > 5  # what length had to do with it
    assert 100 * ours.mean == pytest.approx(LENGTH_ALONE, abs=0.01)


def test_the_package_reads_what_is_written_and_its_rate_at_equal_length_is_ours(tmp_path: Path) -> None:
    if subprocess.run([PYTHON, "-c", "import alpaca_eval"], capture_output=True, check=False).returncode:
        pytest.skip("alpaca-eval is not installed; ALPACA_EVAL_PYTHON names an interpreter that has it")
    preference, first, second = annotations()
    rows = [
        {
            **{"index": i, "instruction": f"i{i}", "output_1": "x" * int(a), "output_2": "y" * int(b)},
            **{"generator_1": "baseline", "generator_2": "ours", "annotator": "nobody", "preference": 1 + float(p)},
        }
        for i, (p, a, b) in enumerate(zip(preference, first, second, strict=True))
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    gamed = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    difficulties = np.random.RandomState(1).randn(len(rows))
    gamed += [f"long,{i},0.5,0.0,{difficulty},False" for i, difficulty in enumerate(difficulties)]
    (tmp_path / "gamed.csv").write_text("\n".join(gamed) + "\n")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "prompt.txt").write_text("{instruction}: {output_1} or {output_2}?\n")
    (tmp_path / "judge" / "configs.yaml").write_text(JUDGE)
    written = [{"instruction": f"i{i}", "output": f"o{i}", "generator": "ours-7"} for i in range(3)]
    (tmp_path / "outputs.json").write_text(json.dumps(written))
    references = [{"instruction": f"i{i}", "output": f"r{i}", "generator": "baseline"} for i in range(3)]
    (tmp_path / "references.json").write_text(json.dumps(references))
    files = [
        str(tmp_path / name) for name in ("annotations.json", "gamed.csv", "outputs.json", "references.json", "judge")
    ]
    finished = subprocess.run(
        [PYTHON, "-c", PROGRAM, *files], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout.rpartition("FOUND")[2])
    assert found["length_controlled_minimal"] == pytest.approx(LENGTH_ALONE, abs=0.01)
    assert found["length_controlled_v1"] == pytest.approx(LEADERBOARD, abs=0.01)
    assert found["leaderboard"]["ours-7"]["n_total"] == 3
    assert [(row["instruction"], row["output_2"]) for row in found["annotated"]] == [
        (f"i{i}", f"o{i}") for i in range(3)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ("{}", "expected an array of objects, each with an 'instruction'"),
        (
            '[{"instruction": "a"}, {"output": "b"}]',
            r"row 2 is \{'output': 'b'\}; an object with a text as 'instruction'",
        ),
        ('[{"instruction": " "}]', "row 1 is"),
    ],
)
def test_what_are_no_instructions_is_one_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=f"--alpaca_eval={tmp_path / 'eval.json'}: .*{message}"):
        read_instructions(tmp_path / "eval.json")


def test_of_a_file_of_another_models_outputs_the_instructions_are_read(tmp_path: Path) -> None:
    row = {
        "instruction": "Why?",
        "output": "Because.",
        "generator": "davinci",
        "dataset": "helpful_base",
        "datasplit": "eval",
    }
    (tmp_path / "eval.json").write_text(json.dumps([row, {"instruction": "How?"}]))
    assert read_instructions(tmp_path / "eval.json") == [
        {"instruction": "Why?", "dataset": "helpful_base"},
        {"instruction": "How?"},
    ]
