"""Claim: an export names the digit that it sees or hears, in a Python where triptych is not installed.

    python benchmarks/name_digits.py EXPORT SHARD.tar [SHARD.tar ...]

Writes a caption for every image and every sound of the shards with plain transformers, greedily, and counts the
captions whose first digit, as a word or a numeral, is the sample's label. Prints JSON.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile

import soundfile
import soxr
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModelForMultimodalLM, AutoTokenizer

WORDS = "zero one two three four five six seven eight nine".split()


def digit(caption: str) -> int:
    """The first digit that a caption names, -1 for none."""
    for word in re.findall(r"[a-z]+|\d+", caption.lower()):
        if word in WORDS:
            return WORDS.index(word)
        if word.isdigit():
            return int(word)
    return -1


def read_samples(shards: list[str]) -> dict[str, dict[str, bytes]]:
    """Members of the shards by key and extension."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


@torch.inference_mode()
def main(folder: str, shards: list[str]) -> None:
    """Caption, count, print."""
    model = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder)
    sounds = AutoFeatureExtractor.from_pretrained(folder)

    def caption(prompt: str, **inputs: torch.Tensor) -> str:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = model.generate(input_ids=ids, do_sample=False, max_new_tokens=40, **inputs)
        return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    right = {"image": 0, "audio": 0}
    total = {"image": 0, "audio": 0}
    for sample in read_samples(shards).values():
        label = json.loads(sample["json"])["label"]
        if "png" in sample:
            found = images(Image.open(io.BytesIO(sample["png"])).convert("RGB"), return_tensors="pt")
            prompt = "<bos><boi>" + "<image>" * int(found.pop("num_soft_tokens_per_image")[0]) + "<eoi>"
            right["image"] += digit(caption(prompt, **found)) == label
            total["image"] += 1
        encoded = sample.get("flac") or sample.get("wav")
        if encoded:
            wave, rate = soundfile.read(io.BytesIO(encoded), dtype="float32")
            wave = soxr.resample(wave, rate, sounds.sampling_rate)
            found = sounds([wave], max_length=len(wave), return_tensors="pt")
            prompt = "<bos><boa>" + "<audio>" * int(found["input_features_mask"][0][::4].sum()) + "<eoa>"
            right["audio"] += digit(caption(prompt, **found)) == label
            total["audio"] += 1
    share = {name: round(right[name] / total[name], 4) if total[name] else None for name in total}
    print(json.dumps({"named": share, "right": right, "total": total}))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
