"""Clients of the server: OpenAI's own, garserve's, and the examples of the documentation, run as they stand there."""

import asyncio
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import garserve
from garserve.client_answers import RegionText
from garserve.client_wire import region_json
from garserve.engine import Engine
from tests.conftest import PHOTO, ROOT
from tests.served import QUESTION, REGIONS, Served, chat_body, data_url

pytest.importorskip("vllm", reason="vLLM is not installed (pip install garserve[cpu] or garserve[gpu])")
pytestmark = pytest.mark.vllm

DOCUMENT = (ROOT / "docs" / "serving.md").read_text()


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)


@pytest.fixture(scope="module")
def truth(tiny_reference: Engine) -> dict[str, Any]:
    return {
        "answer": tiny_reference.ask(PHOTO, REGIONS, QUESTION, max_tokens=64).text,
        "captions": [answer.text for answer in tiny_reference.describe(PHOTO, REGIONS, max_tokens=64)],
        "what": tiny_reference.ask(PHOTO, REGIONS[:1], "What is <Prompt0>?").text,
    }


@pytest.fixture
def folder(server: Served, tmp_path: Path) -> Path:
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize("number", range(len(examples("bash"))))
def test_curl_examples(server: Served, truth: dict[str, Any], folder: Path, number: int) -> None:
    script = examples("bash")[number].replace("http://127.0.0.1:8000", server.url)
    out = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, cwd=folder, check=True).stdout
    if "chat" in script:
        assert json.loads(out)["choices"][0]["message"]["content"] == truth["answer"]
    elif '"stream"' in script:
        found = [json.loads(line[6:]) for line in out.splitlines() if line.startswith("data: {")]
        texts = {piece["index"]: piece["text"] for piece in found if "text" in piece}
        assert [texts[0], texts[1]] == truth["captions"]
        assert out.rstrip().endswith("data: [DONE]")
    else:
        assert [item["text"] for item in json.loads(out)["descriptions"]] == truth["captions"]


def test_python_examples(server: Served, truth: dict[str, Any], folder: Path) -> None:
    outputs = []
    for script in examples("python"):
        code = script.replace("http://127.0.0.1:8000", server.url)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
        outputs.append(run.stdout)
    assert outputs[0].strip() == truth["answer"]
    described, what, streamed = outputs[1].splitlines()
    assert (described, what, streamed) == (f"0 {truth['captions'][0]}", truth["what"], truth["captions"][1])


def test_the_openai_client_streams_and_refuses(server: Served, truth: dict[str, Any]) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    body = chat_body()
    stream = client.chat.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == truth["answer"]
    with pytest.raises(openai.BadRequestError, match=r"regions\[0\]: box: expected 4 numbers") as refusal:
        client.chat.completions.create(**chat_body(regions=[{"box": [1]}]))
    assert refusal.value.param == "regions[0]"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**body, "model": "other"})

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as own:
            answers = await asyncio.gather(*(own.chat.completions.create(**body) for _ in range(4)))
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(several()) == [truth["answer"]] * 4


def test_the_openai_client_goes_on_with_an_answer(server: Served, tiny_reference: Engine) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    further = "Which is larger, <Prompt0> or <Prompt1>?"
    body = chat_body()
    first = client.chat.completions.create(**body)
    messages = [*body["messages"], first.choices[0].message, {"role": "user", "content": further}]
    second = client.chat.completions.create(**{**body, "messages": messages})
    chat = tiny_reference.chat(PHOTO, REGIONS, max_tokens=64)
    assert [one.choices[0].message.content for one in (first, second)] == [
        chat.say(QUESTION).text,
        chat.say(further).text,
    ]


def test_garserves_client(server: Served, truth: dict[str, Any]) -> None:
    with garserve.Client(server.url) as client:
        assert [item.text for item in client.describe(PHOTO, REGIONS, max_tokens=64)] == truth["captions"]
        streamed = sorted(client.stream_describe(PHOTO, REGIONS), key=lambda item: item.index)
        assert [item.text for item in streamed] == truth["captions"]
        assert client.ask(PHOTO, REGIONS, QUESTION) == truth["answer"]
        assert "".join(client.stream_ask(PHOTO, REGIONS, QUESTION)) == truth["answer"]
        with pytest.raises(garserve.ServerError, match="400: regions: expected 1 to 256, got 0") as refusal:
            client.describe(PHOTO, [])
        assert (refusal.value.status, refusal.value.param) == (400, "regions")
        with pytest.raises(garserve.ServerError, match="names <Prompt3>"):
            list(client.stream_ask(PHOTO, REGIONS, "What is <Prompt3>?"))

    async def all_of_it() -> tuple[list[RegionText], list[RegionText], str, str]:
        async with garserve.AsyncClient(server.url, model="tiny") as client:
            return (
                await client.describe(PHOTO, REGIONS),
                [item async for item in client.stream_describe(PHOTO, REGIONS)],
                await client.ask(PHOTO, REGIONS, QUESTION),
                "".join([piece async for piece in client.stream_ask(PHOTO, REGIONS, QUESTION)]),
            )

    described, in_any_order, answer, pieces = asyncio.run(all_of_it())
    assert [item.text for item in described] == truth["captions"]
    assert {item.text for item in in_any_order} == set(truth["captions"])
    assert answer == pieces == truth["answer"]


def test_every_region_can_be_sent(tmp_path: Path) -> None:
    """What a Region draws here, it draws there: as JSON and back."""
    from pycocotools import mask as coco

    mask = np.zeros((60, 80), bool)
    mask[10:30, 20:50] = True
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    regions = [
        garserve.Region.from_mask(mask),
        garserve.Region.from_box([60, 40, 95, 70], clip=True),
        garserve.Region.from_xywh([3, 4, 20, 10]),
        garserve.Region.from_polygon([[[0, 0], [30, 0], [0, 30]], [[50, 50], [70, 50], [50, 59]]]),
        garserve.Region.from_rle(encoded),
        garserve.Region.from_points([[10, 10], [40, 30]], radius=5),
        garserve.Region.from_scribble([[10, 10], [40, 30]], width=5),
    ]
    for region in regions:
        sent = json.loads(json.dumps(region_json(region)))
        back = garserve.Region.parse(sent)
        assert (back.mask(60, 80) == region.mask(60, 80)).all(), sent.keys()


def test_images_of_every_kind_can_be_sent(server: Served, truth: dict[str, Any]) -> None:
    from PIL import Image

    with contextlib.closing(Image.open(PHOTO)) as picture, garserve.Client(server.url) as client:
        pixels = np.asarray(picture.convert("RGB"))
        png = io.BytesIO()
        picture.save(png, "PNG")
        file = f"file://{server.folder}/photo.jpg"
        for image in (PHOTO.read_bytes(), str(PHOTO), picture, pixels, png.getvalue(), data_url(), file):
            assert client.ask(image, REGIONS, QUESTION) == truth["answer"]
