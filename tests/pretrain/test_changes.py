"""Each setting has a class; a resume names what differs, and refuses what may not, in at most five lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import BadInput
from launch.cli import app
from pretrain.changes import KINDS, Difference, check_fields, covers, differences, refusal, spell_out
from pretrain.config import Config
from pretrain.config_fields import list_settings
from pretrain.resume import TrainerState, candidate, check, check_tokenizer, tokenizer_hash, tokenizers_of, unreadable
from tests.pretrain.tiny import tiny_config, word_tokenizer


def test_every_setting_is_put_into_one_class_on_purpose() -> None:
    settings = {setting.path.split("[]")[0] for setting in list_settings(Config)}
    assert set(KINDS) - settings == set(), "no such settings"
    assert settings - set(KINDS) == set(), "put these into a class in pretrain/changes.py"


def changed(**sections: dict[str, Any]) -> list[Difference]:
    return differences(tiny_config().model_dump(mode="json"), tiny_config(**sections))


def test_differences_come_field_by_field_with_their_class() -> None:
    found = changed(
        run={"dir": "elsewhere", "seed": 3},
        data={**tiny_config().data.model_dump(), "train": "moved", "micro_batch": 2},
        model={**tiny_config().model.model_dump(), "text": {"num_hidden_layers": 3}},
        train={"learning_rate": 0.1},
        engine={"zero_stage": 3, "precision": "bf16"},
    )
    assert [(str(each), each.kind) for each in found] == [
        ("run.dir: unused -> elsewhere", "free"),
        ("run.seed: 0 -> 3", "fatal"),
        ("data.train: unused -> moved", "free"),
        ("data.micro_batch: null -> 2", "free"),
        ("model.text.num_hidden_layers: 2 -> 3", "fatal"),
        ("train.learning_rate: 0.001 -> 0.1", "allowed"),
        ("engine.zero_stage: 2 -> 3", "free"),
        ("engine.precision: fp32 -> bf16", "allowed"),
    ]
    assert changed() == []


def test_a_moved_folder_is_free_and_other_shares_are_a_mixture() -> None:
    data = tiny_config().data.model_dump()
    (one,) = changed(data={**data, "train": [{"path": "moved"}]})
    assert one.kind == "free"
    for train in ([{"path": "unused", "weight": 2.0}], [{"path": "unused"}, {"path": "more"}]):
        (one,) = changed(data={**data, "train": train})
        assert one.kind == "mixture"
        assert refusal([one], [], "step-00000009") is None, "the data say whether the mixture is another"


def test_a_config_of_another_version_is_read_with_this_versions_defaults() -> None:
    old = tiny_config().model_dump(mode="json")
    del old["data"]["image"]["draft"]
    old["model"]["gone"] = 1
    old["more"] = {"of": "it"}
    assert [(each.field, each.old, each.new, each.kind) for each in differences(old, tiny_config())] == [
        ("model.gone", 1, None, "free"),
        ("more", {"of": "it"}, None, "free"),
    ]
    old["train"]["schedule"] = "a shape that was dropped"
    assert "train.schedule" in {each.field for each in differences(old, tiny_config())}


def test_a_refusal_names_everything_in_five_lines() -> None:
    found = changed(
        run={"dir": "unused", "seed": 3}, train={"learning_rate": 0.1, "beta1": 0.8}, logging={"every_steps": 3}
    )
    text = refusal(found, [], "step-00000009") or ""
    assert len(text.splitlines()) == 5
    for part in ("step-00000009", "run.seed: 0 -> 3", "train.learning_rate: 0.001 -> 0.1", "train.beta1: 0.9 -> 0.8"):
        assert part in text
    assert "logging.every_steps: 10 -> 3" in text and "run.dir" in text.splitlines()[-1]
    assert "--allow-change train" not in text.splitlines()[-1], "it would not help: the seed cannot change"

    found = changed(train={"learning_rate": 0.1, "beta1": 0.8})
    text = refusal(found, ["train.beta1"], "step-00000009") or ""
    assert text.splitlines()[-1] == (
        "put them back, go on with --allow-change train.learning_rate, or use another run.dir"
    )
    assert refusal(found, ["train"], "step-00000009") is None
    assert covers(["data"], "data.train") and not covers(["data.tra"], "data.train")


def test_allow_change_takes_settings_and_sections_that_may_change() -> None:
    check_fields(["train", "data.train", "losses.text", "engine.precision", "objectives"])
    with pytest.raises(BadInput, match=r"train.learning_rat: no such setting; did you mean train.learning_rate\?"):
        check_fields(["train.learning_rat"])
    for field in ("run.seed", "data.global_batch", "model.text"):
        with pytest.raises(BadInput, match=f"{field}.*new run.dir"):
            check_fields([field])


def test_a_bare_allow_change_means_the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spell_out(["c.yaml", "--allow-change"]) == ["c.yaml", "--allow-change=data.train"]
    assert spell_out(["--allow-change", "--set", "a=b"]) == ["--allow-change=data.train", "--set", "a=b"]
    assert spell_out(["--allow-change", "runs/c.yaml"]) == ["--allow-change=data.train", "runs/c.yaml"]
    assert spell_out(["--allow-change", "train", "--allow-change"]) == [
        "--allow-change",
        "train",
        "--allow-change=data.train",
    ]

    from typer.testing import CliRunner

    seen: list[Any] = []

    def record(*arguments: Any) -> int:
        seen.append(arguments[-1])
        return 0

    monkeypatch.setattr("launch.train_command.train_command", record)
    for arguments in (
        ["c.yaml", "--allow-change"],
        ["c.yaml", "--allow-change", "train", "--allow-change"],
        ["c.yaml"],
    ):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == 0, result.output
    assert [list(fields) for fields in seen] == [["data.train"], ["train", "data.train"], []]


def saved(folder: Path, step: int, **changes: Any) -> Path:
    """A checkpoint folder with a trainer.json that its manifest lists, and no tensors."""
    import hashlib

    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    state = {"step": step, "data": {}, "config": tiny_config(str(folder)).model_dump(mode="json"), **changes}
    text = json.dumps({name: value for name, value in state.items() if value is not None})
    (path / "trainer.json").write_text(text)
    files = {"trainer.json": {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}}
    (path / "MANIFEST.json").write_text(json.dumps({"files": files}))
    return path


def test_the_trainers_state_is_read_across_versions(tmp_path: Path) -> None:
    path = saved(tmp_path, 4, of_a_later_version={"x": 1}, watch={"non_finite": 2, "later": 3})
    state = TrainerState.read(path)
    assert (state.step, state.watch, state.tokenizer) == (4, {"non_finite": 2, "later": 3}, {})
    assert TrainerState.read(saved(tmp_path, 5)).watch == {}
    with pytest.raises(BadInput, match=r"step-00000006: trainer\.json has no data"):
        TrainerState.read(saved(tmp_path, 6, data=None))

    from pretrain.watch import Watch

    watch = Watch(tiny_config().watch)
    watch.resume({})
    assert watch.state()["non_finite"] == 0
    watch.resume(state.watch)
    assert watch.state()["non_finite"] == 2


def test_the_likely_start_is_the_newest_one_with_its_own_state(tmp_path: Path) -> None:
    assert candidate(tmp_path, "auto") is None
    older, newer = saved(tmp_path, 3), saved(tmp_path, 6)
    assert candidate(tmp_path, "auto") == newer and candidate(tmp_path, str(older)) == older
    (newer / "trainer.json").write_text("{}")
    assert candidate(tmp_path, "auto") == older and candidate(tmp_path, "never") is None


def test_a_tokenizer_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    folder, run = tmp_path / "tokenizer", tmp_path / "run"
    word_tokenizer().save_pretrained(str(folder))
    data = {**tiny_config().data.model_dump(), "text": {"tokenizer": str(folder)}}
    config = tiny_config(str(run), data=data)
    before = tokenizers_of(config)
    path = saved(run, 3, config=config.model_dump(mode="json"), tokenizer=before)
    assert check(path, config, []) == []
    (folder / "README.md").write_text("no tokenizer reads this")
    assert check(path, config, []) == []
    moved = tiny_config(str(run), data={**data, "text": {"tokenizer": str(folder.rename(tmp_path / "moved"))}})
    assert [(each.field, each.kind) for each in check(path, moved, [])] == [("data.text.tokenizer", "free")]
    (tmp_path / "moved").rename(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w7"', '"v7"'))
    with pytest.raises(BadInput, match="another tokenizer.*data.text.tokenizer"):
        check(path, config, [])
    (folder / "tokenizer.json").unlink()
    assert tokenizer_hash(folder) is None
    with pytest.raises(BadInput, match="no tokenizer.json"):
        check(path, config, [])


def test_a_run_tokenizer_that_was_made_anew_is_refused(tmp_path: Path) -> None:
    state = TrainerState(3, {}, {}, tokenizer={"folder": None, "run": "a" * 64})
    check_tokenizer(tmp_path, state, {"folder": None, "run": "a" * 64})
    check_tokenizer(tmp_path, TrainerState(3, {}, {}), {"folder": None, "run": "b" * 64})
    with pytest.raises(BadInput, match="RUN/tokenizer"):
        check_tokenizer(tmp_path, state, {"folder": None, "run": "b" * 64})


def test_a_checkpoint_that_this_torch_cannot_read_names_both_versions(tmp_path: Path) -> None:
    path = saved(tmp_path, 3, versions={"torch": "9.9", "deepspeed": "7.7"})
    text = unreadable(path, RuntimeError("PytorchStreamReader failed\nmore"))
    assert "torch 2" in text and "written by 9.9" in text and "written by 7.7" in text and "\n" not in text
