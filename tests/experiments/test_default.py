"""The embedded default: small enough, trained as configs/train/tiny.yaml says, and as good as it claims."""

from __future__ import annotations

import ast
import json
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hymba.experiments.bits import bits_per_byte
from hymba.experiments.corpus import load_corpus, split_position
from hymba.experiments.settings import DataSettings, TrainSettings, load_settings

DEFAULT = Path(str(files("hymba"))) / "assets" / "default"
TINY = Path(__file__).resolve().parents[2] / "configs" / "train" / "tiny.yaml"


@pytest.fixture(scope="module")
def record():
    return json.loads((DEFAULT / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForCausalLM.from_pretrained(DEFAULT), AutoTokenizer.from_pretrained(DEFAULT)


def test_it_takes_at_most_four_megabytes():
    assert sum(path.stat().st_size for path in DEFAULT.rglob("*")) <= 4_000_000


def test_the_record_names_corpus_python_and_figure(record):
    corpus = record["corpus"]
    assert len(corpus["sha256"]) == 64
    assert corpus["python"].count(".") == 2
    assert record["held_out"]["bits_per_byte"] <= 1.10
    assert record["held_out"]["bytes"] == corpus["held_out"]["bytes"] == sum(corpus["held_out"]["list"].values())
    for side in ("train", "held_out"):
        for name in corpus[side]["list"]:
            assert (split_position(name) < record["settings"]["data"]["held_out"]) == (side == "held_out")


def test_it_was_trained_as_the_shipped_file_says(record):
    shipped, defaults = (json.loads(json.dumps(s.to_dict())) for s in (load_settings(TINY), TrainSettings()))
    assert record["settings"].keys() <= shipped.keys()
    for section, values in shipped.items():
        # A setting that came after the training has its default in the shipped file.
        recorded = record["settings"].get(section, {})
        assert values == (defaults[section] | recorded if recorded else defaults[section])


def test_the_figure_on_held_out_files_of_this_python(record, loaded):
    model, tokenizer = loaded
    settings = DataSettings(**{key: record["settings"]["data"][key] for key in ("source", "held_out")})
    held_out = load_corpus(settings).held_out
    # A few middle-sized files: the figure over all of them is the script's to print.
    some = [document for document in held_out if 1_500 < len(document.text) < 11_000][:6]
    assert len(some) >= 3
    assert bits_per_byte(model, tokenizer, some, context=512).per_byte < 1.2


def test_its_continuation_of_def_reads_like_python(loaded):
    model, tokenizer = loaded
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=60)
    lines = tokenizer.decode(out[0], skip_special_tokens=True).split("\n")
    while lines and not parses("\n".join(lines)):
        lines.pop()
    assert len(lines) >= 3
    assert isinstance(ast.parse("\n".join(lines)).body[0], ast.FunctionDef)


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
