"""From a real ZeRO run to a folder, and back through plain transformers in processes that have no triptych."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForMultimodalLM

from data_pipelines import open_dataset
from data_pipelines.errors import BadInput
from pretrain import export as export_module
from pretrain.config import load_config
from pretrain.consolidate import Weights
from pretrain.export import export, write_backbone
from pretrain.model.omni import OmniPretrainer
from pretrain.restore import find_checkpoint, restore_export, restore_run
from pretrain.verify import verify_export, write_manifest
from tests.pretrain.tiny import tiny_config, word_tokenizer
from tests.small_run import STEPS, small_run

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return OmniPretrainer.build(tiny_config(), word_tokenizer()).backbone


def weights_of(backbone: torch.nn.Module) -> Weights:
    return Weights({name: tensor.detach() for name, tensor in backbone.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_hold_what_save_pretrained_would_write(backbone, tmp_path, dtype):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    assert write_backbone(backbone, weights_of(backbone), ours, dtype) == 1
    # A copy: `to` would change the model that the other tests share.
    copy = type(backbone)(backbone.config)
    copy.load_state_dict(backbone.state_dict())
    copy.to(dtype).save_pretrained(theirs)
    found, expected = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert set(found) == set(expected) and "lm_head.weight" not in found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1]
    with safe_open(ours / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index_load_as_one(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_BYTES", 300_000)
    count = write_backbone(backbone, weights_of(backbone), tmp_path, torch.float32)
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert count == len(files) > 1 and files[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def test_a_checkpoint_that_lacks_a_tensor_is_a_fault(backbone, tmp_path):
    some = dict(backbone.state_dict())
    some.pop("model.language_model.norm.weight")
    with pytest.raises(RuntimeError, match=r"lacks 1 tensors.*norm\.weight"):
        write_backbone(backbone, Weights(some), tmp_path, torch.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """A run under ZeRO 2, and its export."""
    folder = small_run(2)
    out = tmp_path_factory.mktemp("exports") / "export"
    outcome = export(folder / "run", out)
    assert outcome is not None and outcome.verified and outcome.num_probes == 7
    return folder, out


pytest_distributed = pytest.mark.distributed


@pytest_distributed
@pytest.mark.timeout(280)
class TestOfARun:
    def test_it_loads_as_several_classes_and_holds_the_runs_weights(self, exported):
        folder, out = exported
        run = restore_run(folder / "run", find_checkpoint(folder / "run")[0])
        expected = run.model.backbone.state_dict()
        for loader in (AutoModelForMultimodalLM, AutoModelForCausalLM):
            found = loader.from_pretrained(out).state_dict()
            assert set(found) == set(expected)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert AutoConfig.from_pretrained(out).architectures == ["Gemma4ForConditionalGeneration"]

    def test_it_restores_with_its_heads(self, exported):
        folder, out = exported
        run = restore_run(folder / "run", find_checkpoint(folder / "run")[0])
        back = restore_export(out)
        assert back.step == run.step == STEPS
        expected = run.model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in back.model.state_dict().items())
        assert load_config(out / "training_config.yaml") == load_config(folder / "run" / "config.yaml")

    def test_the_heads_are_not_among_the_weights_that_loaders_find(self, exported):
        _, out = exported
        assert [path.name for path in out.glob("*.safetensors")] == [WEIGHTS]
        assert all(name.startswith(("model.", "lm_head")) for name in load_file(out / WEIGHTS))
        assert "similarity.logit_scale" in load_file(out / "pretrain_heads" / WEIGHTS)

    def test_nothing_half_made_stays_and_others_may_read_it(self, exported):
        _, out = exported
        assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o666 & ~_umask()}
        assert [path.name for path in out.parent.iterdir()] == [out.name]

    def test_verification_compares_samples_of_the_data_too(self, exported):
        folder, out = exported
        outcome = verify_export(out, open_dataset(folder / "test"))
        assert outcome.verified, outcome.problems
        assert outcome.num_probes == 7 and outcome.same_captions
        assert outcome.largest_loss_difference < 1e-4
        with pytest.raises(BadInput, match="not the data"):
            verify_export(out, open_dataset(folder / "train"))

    def test_every_program_of_the_card_runs_as_it_stands(self, exported):
        _, out = exported
        programs = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        assert len(programs) == 2
        for program in programs:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=out, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr[-2000:]
            assert "triptych" not in program

    def test_the_cards_metadata_is_read_back(self, exported):
        folder, out = exported
        card = ModelCard.load(out / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
        assert card.data.datasets == ["small-train"]
        results = json.loads((folder / "run" / "eval" / "results.json").read_text())
        measured = {(found.task_type, found.metric_name): found.metric_value for found in card.data.eval_results}
        assert measured["zero-shot-image-classification", "top-1"] == round(results["zero_shot"]["image_top1"], 4)
        assert json.loads((out / "eval" / "results.json").read_text()) == results

    def test_the_card_counts_the_data(self, exported):
        _, out = exported
        text = (out / "README.md").read_text()
        row = next(line for line in text.splitlines() if line.startswith("| small-train (training)"))
        assert [cell.strip() for cell in row.split("|")][2:6] == ["32", "28", "28", "28"]
        assert "license: CC0-1.0: 32 samples" in text
        assert "{{" not in text and "{%" not in text


@pytest_distributed
@pytest.mark.timeout(280)
class TestOfWrongExports:
    @pytest.fixture
    def copy(self, exported, tmp_path) -> Path:
        return Path(shutil.copytree(exported[1], tmp_path / "copy"))

    def test_a_flipped_bit_a_missing_and_a_foreign_file_are_named(self, copy):
        file = copy / WEIGHTS
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        (copy / "prompts.json").unlink()
        (copy / "extra.py").write_text("print('hello')")
        (copy / ".gitattributes").write_text("what the Hub adds does not count")
        problems = verify_export(copy).problems
        assert len(problems) == 3
        assert any(WEIGHTS in problem and "SHA-256" in problem for problem in problems)
        assert "prompts.json is missing" in problems and "extra.py is not in MANIFEST.json" in problems

    def test_other_weights_under_a_fitting_manifest_are_found_out(self, copy):
        weights = load_file(copy / WEIGHTS)
        weights["model.language_model.norm.weight"] *= 1.02
        save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
        write_manifest(copy)
        problems = verify_export(copy).problems
        assert problems and all("logits differ" in problem or "caption loss" in problem for problem in problems)

    def test_a_tensor_that_is_left_out_is_found_out(self, copy):
        weights = load_file(copy / WEIGHTS)
        del weights["model.language_model.layers.0.mlp.up_proj.weight"]
        save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
        write_manifest(copy)
        assert any("up_proj" in problem for problem in verify_export(copy).problems)

    def test_another_geometry_is_found_out(self, copy):
        settings = json.loads((copy / "processor_config.json").read_text())
        settings["feature_extractor"]["hop_length_ms"] = 20.0
        (copy / "processor_config.json").write_text(json.dumps(settings))
        write_manifest(copy)
        assert any("num_audio_tokens" in problem for problem in verify_export(copy).problems)

    def test_what_transformers_cannot_load_is_one_line(self, copy):
        (copy / "config.json").write_text("{}")
        write_manifest(copy)
        problems = verify_export(copy).problems
        assert len(problems) == 1 and "cannot load" in problems[0] and "\n" not in problems[0]


@pytest_distributed
@pytest.mark.timeout(280)
def test_weights_that_were_split_over_ranks_are_verified_too(tmp_path):
    folder = small_run(3)
    outcome = export(folder / "run", tmp_path / "export")
    assert outcome is not None and outcome.verified and outcome.largest_loss_difference < 1e-4
    run = restore_run(folder / "run", find_checkpoint(folder / "run")[0])
    found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in run.model.backbone.state_dict().items())
    # This run takes images as they are; then resizing is the processor's.
    assert AutoImageProcessor.from_pretrained(tmp_path / "export").do_resize
    program = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)[0]
    assert "resize" not in program
    subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path / "export", check=True, timeout=120)


@pytest_distributed
@pytest.mark.timeout(280)
def test_half_precision_is_verified_and_its_programs_run(tmp_path):
    folder = small_run(2)
    outcome = export(folder / "run", tmp_path / "half", step=2, dtype="bf16")
    assert outcome is not None and outcome.verified
    weights = load_file(tmp_path / "half" / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert not (tmp_path / "half" / "eval" / "results.json").exists(), "the run was evaluated at another step"
    for program in re.findall(r"```python\n(.*?)```", (tmp_path / "half" / "README.md").read_text(), re.DOTALL):
        subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path / "half", check=True, timeout=120)


@pytest_distributed
@pytest.mark.timeout(280)
def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path):
    folder = small_run(2)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        export(folder / "run", taken)
    assert (taken / "file").read_text() == "mine"
    with pytest.raises(BadInput, match="no such checkpoint; there are step-00000002, step-00000004"):
        export(folder / "run", tmp_path / "out", step=3)
    with pytest.raises(BadInput, match="not a run directory"):
        export(folder, tmp_path / "out")
    broken = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    victim = next((broken / "checkpoints" / "step-00000004" / "deepspeed").rglob("*model_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(BadInput, match="not a valid checkpoint"):
        export(broken, tmp_path / "out", step=4)
    said: list[str] = []
    outcome = export(broken, tmp_path / "out", check=False, say=said.append)
    assert outcome is None and restore_export(tmp_path / "out").step == 2
    assert any("passed over" in line and "step-00000004" in line for line in said)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
