"""CONTRIBUTING's "How to add a model family" is true: its code adds one, which gives what transformers gives."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from taskgraph.errors import ConfigError, WeightsError
from taskgraph.models import llama
from taskgraph.models.families import FAMILIES, ModelFamily, register
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.session import Session
from tests.models.test_families import SHAPE
from tests.test_docs import ROOT, blocks


@pytest.fixture(autouse=True)
def known_before() -> Iterator[None]:
    """The families of the package, and after the test no others."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def added() -> None:
    """Run the code of the section."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("## How to add a model family\n", 1)[1].split("\n## ", 1)[0]
    (block,) = blocks(section)
    exec(block.code, {})


def test_the_family_of_the_section_equals_transformers(tmp_path: Path) -> None:
    import transformers as hf

    torch.manual_seed(5)
    model = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="MistralForCausalLM"):
        open_checkpoint(tmp_path)
    added()
    with open_checkpoint(tmp_path) as checkpoint:
        config, weights = checkpoint.config, llama.load_weights(checkpoint.config, checkpoint, "f32")
    ids = torch.randint(0, config.vocab_size, (1, 12))
    with Session(config, weights, cache=32) as session, torch.inference_mode():
        wanted = model(ids).logits[0]
        made = session.run(ids[0, :11].tolist(), [0], all_logits=True)[llama.LOGITS].clone()
        decoded = session.run(ids[0, 11:].tolist(), [11])[llama.LOGITS]
    torch.testing.assert_close(torch.cat([made, decoded]), wanted, rtol=1e-4, atol=1e-4)


def test_a_family_is_known_once() -> None:
    added()
    for twin in (ModelFamily("mistral", "AnotherForCausalLM"), ModelFamily("other", "MistralForCausalLM")):
        with pytest.raises(ConfigError, match=r"'mistral'.*known already"):
            register(twin)
