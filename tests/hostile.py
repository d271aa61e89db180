"""Requests that nobody means well with, and the refusal that each gets: name -> (path, body, status, words)."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.served import REGIONS, chat_body, data_url

CHAT, DESCRIBE, REFINE = "/v1/chat/completions", "/v1/regions/describe", "/v1/regions/refine"
Case = tuple[str, Any, int, str]
MASK = "data:image/png;base64,"


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one bit a pixel that claims a size; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = b"".join(chunk(*part) for part in chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def real_bomb() -> bytes:
    """64 million pixels, all there, in a few kilobytes."""
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG", optimize=True)
    return file.getvalue()


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0" * 6 + b"\x2c" + b"\0" * 4 + b"\x3b"


def image_case(image: Any, status: int, words: str, kind: str = "image/png") -> Case:
    url = image if isinstance(image, str) else data_url(image, kind)
    return DESCRIBE, {"image": url, "regions": REGIONS}, status, words


def region_case(regions: Any, words: str) -> Case:
    return DESCRIBE, {"image": data_url(), "regions": regions}, 400, words


def raw_region(text: str, words: str) -> Case:
    """A region as JSON text that Python would not write."""
    body = json.dumps({"image": data_url(), "regions": ["HERE"]}).replace('"HERE"', text)
    return DESCRIBE, body.encode(), 400, words


def chat_case(words: str, *, text: Any = "What is <Prompt0>?", status: int = 400, **fields: Any) -> Case:
    return CHAT, chat_body(text, **fields), status, words


def messages_case(messages: Any, words: str) -> Case:
    return CHAT, {"messages": messages}, 400, words


def cases(folder: Path) -> dict[str, Case]:
    """All of them; `folder` is the server's folder of file:// images, and gets links and pipes."""
    return {**_images(folder), **_places(folder), **_regions(), **_texts(), **_bodies(), **_refinements()}


def _images(folder: Path) -> dict[str, Case]:
    photo = (folder / "photo.jpg").read_bytes()
    text_bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000))
    return {
        "png that claims 3.6 billion pixels": image_case(png(60_000, 60_000), 400, "too many pixels"),
        "png that is one line of 2 billion": image_case(png(2**31 - 1, 1), 400, "too many pixels"),
        "png of one column": image_case(png(1, 10_000_000), 400, "a side of more than 65535"),
        "decompression bomb": image_case(real_bomb(), 400, "more than 50000000 pixels"),
        "gif that claims 4 billion pixels": image_case(gif(65535, 65535), 400, "image data URL: "),
        "png with a bomb of text": image_case(png(10, 10, text_bomb), 400, "image data URL: broken"),
        "png without width": image_case(png(0, 10), 400, "image data URL: "),
        "png without pixels": image_case(png(500, 500), 400, "image data URL: broken"),
        "half a jpeg": image_case(photo[: len(photo) // 2], 400, "image data URL: broken"),
        "text for an image": image_case(b"hello", 400, "not an image"),
        "svg": image_case(b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not an image"),
        "postscript": image_case(b"%!PS-Adobe-3.0 EPSF-3.0\n(id) system", 400, "not an image"),
        "nothing for an image": image_case(b"", 400, "not an image"),
        "not base64": image_case("data:image/png;base64,!!!!", 400, "not base64"),
        "data URL without base64": image_case("data:image/png,abc", 400, "expected base64"),
        "image file of 6 MB": image_case(b"\xff" * 6_000_000, 413, "more than 5242880 bytes"),
    }


def _places(folder: Path) -> dict[str, Case]:
    outside = folder.parent / "secret.txt"
    outside.write_text("secret")
    link, pipe = folder / "link.jpg", folder / "pipe"
    if not link.is_symlink():
        link.symlink_to(outside)
        import os

        os.mkfifo(pipe)
        (folder / "up").symlink_to(folder.parent)
    none = "no such file below the folder"
    return {
        "metadata service": image_case("http://169.254.169.254/latest/meta-data", 400, "not a host"),
        "listed host that is inside": image_case("http://localhost/a.png", 400, "not a public address"),
        "listed host, other port": image_case("http://localhost:22/a.png", 400, "port 22"),
        "listed host that does not exist": image_case("http://metadata.invalid/", 400, "image_url: "),
        "loopback in short": image_case("http://127.1/", 400, "not a host"),
        "loopback as a number": image_case("http://2130706433/", 400, "not a host"),
        "loopback in IPv6": image_case("http://[::1]/", 400, "not a host"),
        "host in a user name": image_case("http://localhost@169.254.169.254/", 400, "expected http"),
        "a broken host": image_case("http://[::1/", 400, "not a URL"),
        "gopher": image_case("gopher://localhost/", 400, "expected data:"),
        "javascript": image_case("javascript:alert(1)", 400, "expected data:"),
        "a bare path": image_case("/etc/passwd", 400, "expected data:"),
        "a file called data": image_case("data", 400, "expected data:"),
        "a data URL in capitals": image_case("DATA:image/png;base64,aGVsbG8=", 400, "not an image"),
        "file outside": image_case("file:///etc/passwd", 400, none),
        "file by dots": image_case(f"file://{folder}/../secret.txt", 400, none),
        "file by encoded dots": image_case(f"file://{folder}/%2e%2e/secret.txt", 400, none),
        "file by a link": image_case(f"file://{link}", 400, none),
        "file by a linked folder": image_case(f"file://{folder}/up/secret.txt", 400, none),
        "file with a zero": image_case(f"file://{folder}/a%00.jpg", 400, none),
        "file that is a folder": image_case(f"file://{folder}", 400, none),
        "file that is a pipe": image_case(f"file://{pipe}", 400, none),
        "file on a host": image_case("file://evil/etc/passwd", 400, "expected file:///"),
        "file on half an address": image_case("file://[x", 400, "expected file:///"),
        "file of processes": image_case("file:///proc/self/environ", 400, none),
    }


def _regions() -> dict[str, Case]:
    wide = [[x % 600, x % 400] for x in range(5_000)]
    small = data_url(np.zeros((4, 4), np.uint8))
    zigzag = [[(i % 2) * 600, i % 400] for i in range(9_000)]
    long = f'{{"rle": {{"size": [400, 600], "counts": {[10**4300 - 1] * 2}}}}}'
    return {
        "10,000 regions": region_case([{"box": [0, 0, 9, 9]}] * 10_000, "expected 1 to 256, got 10000"),
        "no regions": region_case([], "expected 1 to 256, got 0"),
        "six regions in a chat": chat_case("expected 1 to 5, got 6", regions=[{"box": [0, 0, 9, 9]}] * 6),
        "NaN box": raw_region('{"box": [NaN, 0, 9, 9]}', "expected finite numbers"),
        "infinite box": raw_region('{"box": [0, 0, Infinity, 9]}', "expected finite numbers"),
        "box of 1e400": raw_region('{"box": [0, 0, 1e400, 9]}', "regions"),
        "box of 1e308": region_case([{"box": [0, 0, 1e308, 1e308]}], "outside the 600x400 image"),
        "runs of 4,300 digits": raw_region(long, "regions[0]: rle: counts: expected runs of 0 to 240000"),
        "box of a huge whole number": raw_region(f'{{"box": [0, 0, {"9" * 400}, 9]}}', "regions[0]: box: expected"),
        "box turned round": region_case([{"box": [90, 90, 10, 10]}], "expected x1 < x2"),
        "box of texts": region_case([{"box": ["0", "0", "9", "9"]}], "expected numbers"),
        "box of truth": region_case([{"box": [True, False, True, True]}], "expected numbers"),
        "box of three": region_case([{"box": [1, 2, 3]}], "expected 4 numbers"),
        "box outside": region_case([{"box": [1000, 10, 9000, 90]}], "outside the 600x400 image"),
        "region of two kinds": region_case([{"box": [0, 0, 9, 9], "points": [[1, 1]]}], "exactly one of"),
        "region of no kind": region_case([{"path": "/etc/passwd"}], "exactly one of"),
        "region that is a text": region_case(["all"], "regions.0"),
        "regions that are a text": region_case("all", "regions: "),
        "polygon of 100,000 points": region_case([{"polygon": wide * 20}], "at most 10000 points"),
        "polygon of many parts": region_case([{"polygon": [[[0, 0], [9, 0], [9, 9]]] * 9_000}], "at most 10000 points"),
        "polygon nested deep": region_case([{"polygon": [[[[[[[1, 2]]]]]]]}], "nested"),
        "polygon with a long outline": region_case([{"polygon": zigzag}], "outline is longer"),
        "polygon of empty lists": region_case([{"polygon": [[]] * 30_000}], "at most 10000 points"),
        "points with a huge radius": region_case([{"points": [[5, 5]], "radius": 1e300}], "expected a radius"),
        "points with a radius of 400 digits": raw_region(
            f'{{"points": [[5, 5]], "radius": {"9" * 400}}}', "radius: expected a number"
        ),
        "scribble with a width of 400 digits": raw_region(
            f'{{"scribble": [[5, 5], [9, 9]], "width": {"9" * 400}}}', "width: expected a number"
        ),
        "RLE of endless runs": raw_region('{"rle": {"size": [400, 600], "counts": [Infinity]}}', "rle: counts"),
        "RLE of endless size": raw_region('{"rle": {"size": [Infinity, 600], "counts": "00"}}', "rle: size"),
        "points without a radius": region_case([{"points": [[5, 5]], "radius": -1}], "expected a radius"),
        "thousands of large discs": region_case([{"points": wide, "radius": 9_000}], "too many points"),
        "scribble of one point": region_case([{"scribble": [[5, 5]]}], "at least two points"),
        "RLE of another size": region_case([{"rle": {"size": [10**9, 10**9], "counts": [10**18]}}], "rle: size"),
        "RLE of too many pixels": region_case([{"rle": {"size": [400, 600], "counts": [10**12]}}], "rle: counts"),
        "RLE of negative runs": region_case([{"rle": {"size": [400, 600], "counts": [-1, 240_001]}}], "rle: counts"),
        "RLE of half a million runs": region_case(
            [{"rle": {"size": [400, 600], "counts": [1] * 500_000}}], "at most 320000 runs"
        ),
        "RLE in a long text": region_case(
            [{"rle": {"size": [400, 600], "counts": "o" * 1_000_000}}], "at most 320000 characters"
        ),
        "RLE bomb in a text": region_case([{"rle": {"size": [400, 600], "counts": "ooooooooo0"}}], "rle: counts"),
        "RLE in another writing": region_case([{"rle": {"size": [400, 600], "counts": "\u2603" * 9}}], "rle: counts"),
        "mask by path": region_case([{"mask": "/etc/passwd"}], "mask: expected a PNG"),
        "mask by http": region_case([{"mask": "http://localhost/"}], "mask: expected a PNG"),
        "mask bomb": region_case([{"mask": MASK + data_url(real_bomb()).partition(",")[2]}], "more than 240000 pixels"),
        "mask of another size": region_case([{"mask": small}], "expected the image's size"),
        "mask that is a jpeg": region_case([{"mask": data_url()}], "mask: expected a PNG"),
        "mask of nothing": region_case([{"mask": data_url(np.zeros((400, 600), np.uint8))}], "covers no pixel"),
    }


def _texts() -> dict[str, Case]:
    picture = {"type": "image_url", "image_url": {"url": data_url()}, "regions": REGIONS}
    turn = {"role": "user", "content": [picture, {"type": "text", "text": "?"}]}
    return {
        "a region that was not given": chat_case("names <Prompt4>", text="What is <Prompt4>?"),
        "half a character": (CHAT, json.dumps(chat_body("\ud800")).encode(), 400, "body: "),
        "a text of 200,000 characters": chat_case("at most 100000 characters", text="x " * 100_000),
        "a text longer than the model": chat_case("tokens with the image", text="word " * 15_000),
        "two images": messages_case([{"role": "user", "content": [picture, picture]}], "expected one image"),
        "no image": messages_case([{"role": "user", "content": "hi"}], "expected one image"),
        "no messages": messages_case([], "messages"),
        "an image of the system": messages_case([{"role": "system", "content": [picture]}, turn], "messages[0]"),
        "an image of the assistant": messages_case([turn, {"role": "assistant", "content": [picture]}], "one image"),
        "the assistant's turn last": messages_case([turn, {"role": "assistant", "content": "."}], "messages: the"),
        "two answers": messages_case([turn, *[{"role": "assistant", "content": "."}] * 2, turn], "messages: expected"),
        "an unknown role": messages_case([{"role": "tool", "content": "."}], "messages.0.role"),
        "an unknown part": messages_case([{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0"),
        "another model": (CHAT, {**chat_body(), "model": "gpt-x"}, 404, "not served here"),
        "no tokens": chat_case("max_tokens", max_tokens=0),
        "a billion tokens": chat_case("max_tokens", max_tokens=10**9),
        "tokens in a text": chat_case("max_tokens", max_tokens="4"),
        "too hot": chat_case("temperature", temperature=3),
        "a seed below zero": chat_case("seed", seed=-1),
        "a huge seed": chat_case("seed", seed=2**80),
        "a seed that stops vLLM's CPU build": chat_case("seed: vLLM's CPU build", seed=1, temperature=1.0),
        "a thousand answers": chat_case("n: ", n=1000),
        "a hundred stops": chat_case("stop", stop=["a"] * 100),
        "an empty stop": chat_case("stop", stop=""),
        "a template of its own": chat_case("chat_template", chat_template="{{ 7*7 }}"),
        "vLLM's own arguments": chat_case("vllm_xargs", vllm_xargs={"a": 1}),
        "processor arguments": chat_case("mm_processor_kwargs", mm_processor_kwargs={"max_num_tiles": 36}),
        "tools": chat_case("tools", tools=[]),
        "regions twice": (CHAT, {**chat_body(), "regions": REGIONS}, 400, "given twice"),
        "an opaque image without regions": chat_case("regions: missing", regions=None),
    }


def _fields(first: str, count: int) -> bytes:
    """An object of that many more fields."""
    return ("{" + first + "".join(f',"{number:x}":0' for number in range(count)) + "}").encode()


def _bodies() -> dict[str, Case]:
    return {
        "bad UTF-8": (CHAT, b'{"messages": "\xff\xfe"}', 400, "body: "),
        "not JSON": (CHAT, b"messages=1", 400, "body: "),
        "nothing": (DESCRIBE, b"", 400, "body: "),
        "half of it": (DESCRIBE, b'{"image": "da', 400, "body: "),
        "a list": (DESCRIBE, b"[]", 400, "body: "),
        "null": (DESCRIBE, b"null", 400, "body: "),
        "100,000 brackets": (CHAT, b"[" * 100_000, 400, "body: "),
        "deep regions": (DESCRIBE, b'{"image":"a","regions":' + b'[{"a":' * 50_000, 400, "body: "),
        "a million wrong regions": (DESCRIBE, b'{"image":"a","regions":[' + b"1," * 999_999 + b"1]}", 400, "regions.0"),
        "a million empty regions": (DESCRIBE, b'{"image":"a","regions":[' + b"{}," * 999_999 + b"{}]}", 400, "at most"),
        "a million wrong parts": (
            CHAT,
            b'{"messages":[{"role":"user","content":[' + b"1," * 999_999 + b"1]}]}",
            400,
            "messages.0.content.0",
        ),
        "a million empty parts": (
            CHAT,
            b'{"messages":[{"role":"user","content":[' + b"{}," * 999_999 + b"{}]}]}",
            400,
            "messages.0.content.0",
        ),
        "200,000 unknown fields": (DESCRIBE, _fields('"image":"a"', 200_000), 400, "body: expected at most 64 fields"),
        "200,000 fields of metadata": (
            CHAT,
            b'{"messages":[{"role":"user","content":"a"}],"metadata":' + _fields('"a":1', 200_000) + b"}",
            400,
            "metadata: expected at most 64 fields",
        ),
        "a field with a name of 8 MB": (DESCRIBE, b'{"image":"a","' + b"x" * 8_000_000 + b'":1}', 400, "not permitted"),
        "a region with a name of 8 MB": region_case([{"x" * 8_000_000: 1}], "exactly one of"),
        "a zip": (DESCRIBE, zlib.compress(b"{}" * 100), 400, "body: "),
        "an oversized body": (DESCRIBE, b" " * 9_000_000, 413, "body: more than 8388608 bytes"),
    }


def _refinements() -> dict[str, Case]:
    def case(words: str, region: Any, image: str = "", status: int = 400) -> Case:
        return REFINE, {"image": image or data_url(), "region": region}, status, words

    box, wide = {"box": [0, 0, 9, 9]}, [[x % 600, x % 400] for x in range(5_000)]
    return {
        "refinement of a bomb": case("more than 50000000 pixels", box, data_url(real_bomb(), "image/png")),
        "refinement of a picture inside": case("not a host", box, "http://169.254.169.254/latest/meta-data"),
        "refinement of a file outside": case("no such file below the folder", box, "file:///etc/passwd"),
        "refinement of thousands of large discs": case("too many points", {"points": wide, "radius": 9_000}),
        "refinement of a mask by path": case("mask: expected a PNG", {"mask": "/etc/passwd"}),
        "refinement of two regions": case("region", [box, box]),
        "refinement of nothing": case("region", {}),
    }
