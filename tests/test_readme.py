"""What the README promises to people who bring something of their own runs as it is printed there."""

import json
import re
from pathlib import Path

import pytest

from configs import tiny_random
from sea_jax import config, train
from sea_jax.oracles.ledger import Ledger
from sea_jax.runtime import cache

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def fields(text: str) -> dict[str, str]:
    """The --config.FIELD=VALUE flags of a command."""
    return dict(re.findall(r"--config\.([a-z_.0-9]+)='?([^\s']+)'?", text))


def test_the_readmes_own_oracle_loss_rule_and_prompts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (python,) = blocks("python")
    (tmp_path / "mine.py").write_text(python)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (prompts,) = blocks("jsonl")
    (tmp_path / "prompts.jsonl").write_text(
        prompts.replace(', "reference": "They push away their own weight of water."', "")
        + "".join(json.dumps({"prompt": f"What is {number} plus {number}?"}) + "\n" for number in range(20))
    )
    own = next(fields(block) for block in blocks("sh") if "mine:shorter" in block)
    data = next(fields(block) for block in blocks("sh") if "prompts.jsonl" in block)
    assert len(own) == 3
    assert data.pop("data.chat") == "True"  # the tiny model has no chat template
    share = float(data.pop("data.near_duplicate_share"))
    settings = tiny_random.get_config()
    settings.update_from_flattened_dict(
        own | data | {"data.near_duplicate_share": share} | {"data.reference_field": "", "max_queries": 8}
    )
    cache.keep_compiled_programs()
    train.train(settings, tmp_path / "run")
    with Ledger(tmp_path / "run" / "queries.jsonl", writes=False) as ledger:
        paid = [line for line in ledger.lines() if line["counted"]]
    assert len(paid) == 8
    for line in paid:
        lengths = [len(line["first"]), len(line["second"])]
        shown_first, shown_second = reversed(lengths) if line["swapped"] else lengths
        first_shown_wins = float(shown_first < shown_second)
        assert line["label"] == (1 - first_shown_wins if line["swapped"] else first_shown_wins)


def test_every_field_that_the_readme_sets_exists() -> None:
    known = config.flatten(config.default().to_dict()) | config.flatten(config.default_sft().to_dict())
    named = [name for block in blocks("sh") for name in fields(block)]
    assert len(named) > 10
    assert [name for name in named if name not in known] == []


def test_every_file_and_folder_that_the_readme_names_exists() -> None:
    root = Path(__file__).parent.parent
    library, bridge = README.split("## How it is built")[1].split("`gpu_bridge/`")
    for places, text in (([root / "sea_jax"], library), ([root / "gpu_bridge", root / "gpu_bridge/server"], bridge)):
        named = re.findall(r"`([a-z_/]+(?:\.py|/))`", text)
        assert len(named) > 3
        assert [name for name in named if not any((place / name).exists() for place in places)] == []
