"""Load an export with nothing but transformers, and measure what it does with some probes.

Started by `pretrain.verify` as a file, in a fresh and isolated interpreter where triptych cannot be imported, so it is
also the proof that an export needs no code of ours. Usage: python -I reload_export.py EXPORT PROBES_JSON OUT_JSON.

PROBES_JSON is a list of `{image, audio, prompt, prompt_ids, caption_ids, vocabulary, max_new_tokens}`; image and audio
are file paths or null. OUT_JSON gets, for each probe, the same measures that `pretrain.reference` records.
"""

import hashlib
import importlib.abc
import json
import sys
import warnings


class NoTriptych(importlib.abc.MetaPathFinder):
    """Makes an import of triptych fail even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("data_pipelines", "pretrain", "launch", "triptych"):
            raise ImportError(f"{name} must not be needed to load an export")
        return None


def main(export, probes_file, out_file):
    """Measure every probe and write the answers."""
    import numpy as np
    import torch
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModelForMultimodalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with open(probes_file, encoding="utf-8") as file:
        probes = json.load(file)
    with open(f"{export}/prompts.json", encoding="utf-8") as file:
        layout = json.load(file)
    model, loading = AutoModelForMultimodalLM.from_pretrained(
        export, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    image_processor = AutoImageProcessor.from_pretrained(export, local_files_only=True)
    feature_extractor = AutoFeatureExtractor.from_pretrained(export, local_files_only=True)
    answers = []
    for probe in probes:
        inputs, measured = {}, {}
        if probe["image"]:
            pixels = image_processor(open_image(probe["image"], layout["image_size"]), return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"]
            inputs["image_position_ids"] = pixels["image_position_ids"]
            real = (inputs["image_position_ids"][0] >= 0).all(-1)
            patches = np.round(inputs["pixel_values"][0][real].numpy() * 255).astype(np.uint8)
            measured["num_image_tokens"] = int(pixels["num_soft_tokens_per_image"][0])
            measured["pixels_sha256"] = hashlib.sha256(patches.tobytes()).hexdigest()
        if probe["audio"]:
            sound = open_audio(probe["audio"], layout["sampling_rate"], layout["max_audio_seconds"])
            features = feature_extractor([sound], max_length=len(sound), return_tensors="pt")
            inputs["input_features"] = features["input_features"]
            inputs["input_features_mask"] = features["input_features_mask"]
            mel = inputs["input_features"][0][inputs["input_features_mask"][0]]
            measured["num_audio_tokens"] = int(inputs["input_features_mask"][0][::2][::2].sum())
            measured["mel_mean"], measured["mel_std"] = float(mel.mean()), float(mel.std())
        prompt_text = layout["prompts"][probe["prompt"]].format(
            image=layout["image_token"] * measured.get("num_image_tokens", 0),
            audio=layout["audio_token"] * measured.get("num_audio_tokens", 0),
        )
        measured["prompt_ids"] = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        answers.append(measured)
        if measured["prompt_ids"] != probe["prompt_ids"]:
            continue  # the model would refuse features that do not fill the places in the prompt
        with torch.inference_mode():
            prompt = torch.tensor([probe["prompt_ids"]])
            whole = torch.tensor([probe["prompt_ids"] + probe["caption_ids"]])
            logits = model(input_ids=whole, **inputs).logits[0, len(probe["prompt_ids"]) - 1 : -1].float()
            written = model.generate(
                input_ids=prompt, do_sample=False, max_new_tokens=probe["max_new_tokens"], **inputs
            )[0, prompt.shape[1] :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(probe["caption_ids"]))
        vocabulary = torch.tensor(probe["vocabulary"])
        measured["loss"] = float(loss)
        measured["logsumexp"] = logits.logsumexp(-1).tolist()
        measured["logits"] = logits[:, vocabulary].tolist()
        measured["generated_ids"] = written.tolist()
        measured["generated"] = tokenizer.decode(written, skip_special_tokens=True)
    problems = {name: sorted(keys) for name, keys in loading.items() if keys}
    found = {
        "model_class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loading_problems": problems,
        "triptych_imported": any(
            name.split(".")[0] in ("data_pipelines", "pretrain", "launch") for name in sys.modules
        ),
        "probes": answers,
    }
    with open(out_file, "w", encoding="utf-8") as file:
        json.dump(found, file)


def open_image(path, size):
    """A picture as the image processor wants it: RGB, and a square where the model was trained on squares."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return image if size is None or image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def open_audio(path, sampling_rate, max_seconds):
    """A sound as the feature extractor wants it: mono float32 at the model's rate, cut to the longest of training."""
    import numpy as np
    import soundfile
    import soxr

    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = soxr.resample(sound.mean(1), rate, sampling_rate) if rate != sampling_rate else sound.mean(1)
    return np.asarray(mono[: int(max_seconds * sampling_rate)], dtype=np.float32)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.meta_path.insert(0, NoTriptych())
    main(*sys.argv[1:4])
