"""Configs: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import BadInput
from pretrain import yaml_lines
from pretrain.config import Config, dump_config, load_config
from pretrain.config_fields import find_field, list_settings

GOOD = "run: {dir: runs/x}\ndata:\n  train: d\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (GOOD + "trian: {max_steps: 1}\n", 4, "unknown key trian; did you mean train?"),
        (
            GOOD + "train: {learning_rte: 3e-4}\n",
            4,
            "unknown key train.learning_rte; did you mean train.learning_rate?",
        ),
        (GOOD + "  learning_rate: 3\n", 4, "unknown key data.learning_rate; did you mean train.learning_rate?"),
        (GOOD + "engine: {zzz: 1}\n", 4, "unknown key engine.zzz; engine may have zero_stage, precision,"),
        (GOOD + "train.max_steps: 4\n", 4, "write its parts below each other, or use --set train.max_steps="),
        (GOOD + "  global_batch: 2.0\n", 4, "data.global_batch: expected a whole number, got 2.0"),
        (GOOD + "  global_batch: '32'\n", 4, "data.global_batch: expected a whole number, got '32'"),
        (GOOD + "  global_batch: 010\n", 4, "data.global_batch: expected a whole number, got '010'"),
        (GOOD + "  global_batch: -1\n", 4, "data.global_batch: expected a value greater than 0, got -1"),
        (GOOD + "  global_batch: true\n", 4, "data.global_batch: expected a whole number, got true"),
        (GOOD + "  image:\n\n    size: 100\n", 6, "data.image: size 100 is not a multiple of"),
        (GOOD + "train:\n  max_steps: 10\n", 4, "train.warmup_steps 100 is more than train.max_steps 10"),
        (GOOD + "train:\n  max_steps: 10\n  warmup_steps: 11\n", 6, "train.warmup_steps 11 is more than"),
        ("data: {train: x}\n", None, "run is missing"),
        ("run: {}\ndata: {train: x}\n", 1, "run.dir is missing"),
        ("run: {dir: x}\ndata:\n  train: 5\n", 3, "data.train: expected text or list of {path, weight, epochs}, got 5"),
        (
            "run: {dir: x}\ndata:\n  train: {path: d}\n",
            3,
            "data.train: expected text or list of {path, weight, epochs}",
        ),
        ("run: {dir: x}\ndata:\n  train:\n  - path: a\n  - pth: x\n", 5, "did you mean data.train.1.path?"),
        ("run: {dir: x}\ndata:\n  train: []\n", 3, "data.train is an empty list"),
        ("run: {dir: ''}\ndata:\n  train: x\n", 1, "run.dir is empty"),
        (GOOD + "engine: {precision: bf61}\n", 4, "expected 'fp32' or 'bf16', got 'bf61'; did you mean bf16?"),
        (GOOD + "engine: {zero_stage: 4}\n", 4, "engine.zero_stage: expected 0, 1, 2 or 3, got 4"),
        (GOOD + "engine: {offload_parameters: yes}\n", 4, "expected true or false, got 'yes'"),
        (GOOD + "engine: {offload_parameters: true}\n", 4, "engine.offload_parameters needs engine.zero_stage 3"),
        (GOOD + "train: {learning_rate_scale: {txt: 2}}\n", 4, "unknown key train.learning_rate_scale.txt; expected"),
        (GOOD + "train: 3\n", 4, "train: expected a section of key: value lines, got 3"),
        (GOOD + "train:\n", 4, "train: expected a section of key: value lines, got nothing"),
        (GOOD + "losses: {text: .inf}\n", 4, "losses.text: expected a number, got '.inf'"),
        (GOOD + "losses: {text: 1e999}\n", 4, "losses.text: expected a number, got '1e999'"),
        (GOOD + "losses: {action: 1}\n", 4, "losses.action"),
        ("", None, "is empty"),
        ("- 1\n", 1, "expected sections of key: value lines, got a list of 1"),
        ("a: [1\n", 2, "not valid YAML"),
        ("a:\n\tb: 1\n", 2, "not valid YAML"),
        ("a: \0\n", None, "not valid YAML"),
        (GOOD + "---\na: 1\n", 4, "not valid YAML"),
        ("run:\n  dir: x\n  dir: y\n", 3, "run.dir is given twice, first in line 2"),
        ("run: !!python/object/apply:os.getcwd []\n", 1, "tags are not allowed"),
        ("run: {dir: '${TRIPTYCH_NOT_SET}'}\n", 1, "run.dir: environment variable TRIPTYCH_NOT_SET is not set"),
        ("run: {dir: '${HF_TOKEN:-x}'}\n", 1, "looks like a secret"),
        ("run: {dir: '${1a}'}\n", 1, "cannot read '${1a}'"),
        ("run: {dir: '${A'}\n", 1, "cannot read '${A'"),
        ("a: &a [*a]\n", 1, "nested more than"),
        ("[" * 5000, None, "nested more than"),
    ],
)
def test_refusals_name_place_key_and_remedy(tmp_path: Path, text: str, line: int | None, says: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"c.yaml:{line}: " if line else "c.yaml: "), message
    assert says in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.max_step=20", "--set train.max_step: unknown key train.max_step; did you mean train.max_steps?"),
        ("train.max_steps", "--set train.max_steps: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("data..train=3", "expected key=value"),
        ("data.train.x=3", "--set data.train.x: data.train is 'd', so it has no 'x'"),
        ("data.global_batch=abc", "--set data.global_batch: data.global_batch: expected a whole number, got 'abc'"),
        ("data.global_batch=[1", "--set data.global_batch:1: not valid YAML"),
        ("run.name=", "--set run.name: run.name: expected text, got nothing"),
    ],
)
def test_refused_overrides(tmp_path: Path, override: str, says: str) -> None:
    assert refusal(tmp_path, GOOD, override).startswith(says) or says in refusal(tmp_path, GOOD, override)


def test_overrides_win_in_order_and_make_sections(tmp_path: Path) -> None:
    sources = "data.train=[{path: a}, {path: b}]"
    config = load(tmp_path, GOOD, "train.max_steps=5", "train.max_steps=200", sources, "data.train.1.weight=2")
    assert config.train.max_steps == 200
    assert [(source.path, source.weight) for source in config.data.train_sources] == [("a", None), ("b", 2.0)]


def test_numbers_and_times_mean_what_they_look_like(tmp_path: Path) -> None:
    text = GOOD + "  max_bad_rate: 1\ntrain: {learning_rate: 3e-4, epsilon: 1E-8, max_steps: 1_000}\n"
    config = load(tmp_path, text + "slurm: {time: 24:00:00, partition: yes}\n")
    assert (config.train.learning_rate, config.train.epsilon, config.train.max_steps) == (3e-4, 1e-8, 1000)
    assert config.data.max_bad_rate == 1.0
    assert (config.slurm.time, config.slurm.partition) == ("24:00:00", "yes")


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_A", "12")
    monkeypatch.setenv("TRIPTYCH_EMPTY", "")
    text = "run: {dir: 'r/${TRIPTYCH_A}/${TRIPTYCH_EMPTY:-b}/$${x}', name: '${TRIPTYCH_A}'}\n"
    config = load(tmp_path, text + "data: {train: d, global_batch: '${TRIPTYCH_A}'}\n", "run.seed=${TRIPTYCH_A}")
    assert config.run.dir == "r/12/b/${x}"
    assert (config.run.name, config.run.seed, config.data.global_batch) == ("12", 12, 12)


def test_a_runs_own_config_loads_again(tmp_path: Path) -> None:
    text = (
        "run: {dir: '$${x} é', name: '3e-4', seed: 7}\ndata: {train: [{path: '012'}, {path: 'yes'}], global_batch: 8}\n"
    )
    config = load(
        tmp_path, text + "train: {learning_rate: 3e-4, learning_rate_scale: {text: 0.5}}\nmodel: {text: {a: [1]}}\n"
    )
    assert load(tmp_path, dump_config(config)) == config


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_dump_then_parse_is_the_same_value(value: object) -> None:
    assert yaml_lines.parse(yaml_lines.dump(value), "x").value == value


@given(st.text())
def test_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    try:
        yaml_lines.parse(text, "x")
    except BadInput as error:
        assert "\n" not in str(error)


def test_a_reader_of_plain_yaml_sees_the_same_dump(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD + "slurm: {time: '24:00:00'}\ntrain: {learning_rate: 3e-4}\n")
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such config file"),
        (lambda path: path.mkdir(), "cannot read the config: Is a directory"),
        (lambda path: path.write_bytes(b"a: \xff"), "not UTF-8 text (byte 3)"),
        (lambda path: path.write_bytes(b"#" * 1_000_001), "larger than"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: object, says: str) -> None:
    path = tmp_path / "c.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(BadInput, match=says.replace("(", r"\(").replace(")", r"\)")):
        load_config(path)


def test_a_mistyped_file_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(GOOD)
    with pytest.raises(BadInput, match=r"did you mean .*/digits\.yaml\?"):
        load_config(tmp_path / "digit.yaml")


def test_every_setting_is_described(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    settings = list(list_settings(Config, config))
    assert all(setting.description.endswith((".", "?")) for setting in settings)
    values = {setting.path: setting.value for setting in settings}
    assert values["run.dir"] == "runs/x" and values["data.image.patch_size"] == 16
    assert "data.build[].source" in values
    assert all(find_field(Config, tuple(path.replace("[]", "").split("."))) is not None for path in values)
