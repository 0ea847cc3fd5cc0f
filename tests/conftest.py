"""What all tests share."""

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

import make_demo
from mlx_ltx.checkpoints import catalogue
from parity import Comparison, GoldenSet, runner_for

# The first call of anything in MLX compiles or loads something: no deadlines. The same examples on every machine.
settings.register_profile("mlx_ltx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mlx_ltx")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """What is cached by tests, and by the processes that they start, is not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def small_demo(tmp_path_factory):
    """The folder of a smaller, untrained model, which is the demo for all tests within this process.

    Most tests only need some model. What the embedded one makes is tested in ``tests/demo``, by its folder.
    """
    home = tmp_path_factory.mktemp("small")
    folder = home / "weights" / "demo"
    make_demo.make(folder)
    entry = replace(catalogue.MODELS["demo"], default_size=make_demo.SIZE, default_frames=make_demo.FRAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "PACKAGE", home / "mlx_ltx")
        patch.setitem(catalogue.MODELS, "demo", entry)
        yield folder


@pytest.fixture(autouse=True)
def empty_cache(cache_home):
    """No test finds what another one left."""
    shutil.rmtree(cache_home / "mlx_ltx", ignore_errors=True)


@pytest.fixture(scope="session")
def write_hollow():
    """Write a safetensors file of bfloat16 zeros that take no room on the disk."""

    def write(path: Path, shapes: dict[str, list[int]], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for key, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        data = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + end)

    return write


@pytest.fixture(scope="session")
def compare_golden():
    """Run the parity runner of a recorded set; gives its comparisons."""

    def compare(name: str) -> list[Comparison]:
        run = runner_for(name)
        assert run is not None, f"no runner for {name}"
        compared = [result for result in run(GoldenSet(GOLDEN, name)) if isinstance(result, Comparison)]
        assert compared, f"the runner of {name} compared nothing"
        return compared

    return compare


@pytest.fixture(scope="session")
def instruct_gemma(tmp_path_factory, small_demo):
    """The demo's Gemma folder as an instruction-tuned one: with turns in its tokeniser, and a chat template."""
    folder = tmp_path_factory.mktemp("gemma") / "tiny-it"
    shutil.copytree(small_demo / "gemma", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    added = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
    for token in [token for token, identity in vocabulary.items() if identity >= len(vocabulary) - len(added)]:
        tokenizer["model"]["merges"] = [
            merge for merge in tokenizer["model"]["merges"] if "".join(merge).replace(" ", "") != token
        ]
    first = len(vocabulary) - len(added)
    tokenizer["model"]["vocab"] = {token: identity for token, identity in vocabulary.items() if identity < first}
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": first + place, "content": token} for place, token in enumerate(added)
    ]
    path.write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}<start_of_turn>user\n...<end_of_turn>\n")
    return folder
