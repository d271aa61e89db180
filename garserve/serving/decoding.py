"""The engine client as the routes use it: texts are the engine's own, and a dead engine is said in plain words."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GenerationError, RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from garserve.inputs.text_stream import TextStream
from garserve.inputs.tokenizer import GARTokenizer

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

ENGINE_GONE = "the engine has stopped; this server is going down"


class CutOffError(RetryableRequestError):
    """The engine, going down, ended an answer before its end."""


class RegionEngineClient:
    """vLLM's engine client with garserve's texts in its outputs; all else is the client's own.

    vLLM's detokenizer either keeps all special tokens or drops them all; of GAR's, the names of regions are words.
    """

    def __init__(self, client: Any, tokenizer: GARTokenizer, stop_id: int) -> None:
        self._client, self._tokenizer, self._stop_id = client, tokenizer, stop_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(
        self, prompt: Any, sampling_params: "SamplingParams", request_id: str, **options: Any
    ) -> "AsyncGenerator[RequestOutput]":
        """Yield outputs as vLLM does. Leaving early aborts the request in the engine.

        A request with stop texts is detokenized by vLLM, which looks for them. Raises GenerationError for an answer
        that failed, CutOffError for one that vLLM ended early, and RetryableRequestError where the engine has stopped.
        """
        own_text = not sampling_params.stop
        sampling_params.detokenize = not own_text
        streams: dict[int, TextStream] = {}
        try:
            async with aclosing(self._client.generate(prompt, sampling_params, request_id, **options)) as outputs:
                async for output in outputs:
                    for completion in output.outputs:
                        _check_end(completion.finish_reason)
                        if not own_text:
                            continue
                        stream = streams.setdefault(completion.index, TextStream(self._tokenizer, self._stop_id))
                        completion.text = stream.push(
                            list(completion.token_ids), finished=completion.finish_reason is not None
                        )
                    yield output
        except EngineDeadError:
            raise RetryableRequestError(ENGINE_GONE) from None


def _check_end(reason: str | None) -> None:
    if reason == "error":
        raise GenerationError("vLLM could not go on with an answer")
    if reason not in (None, "stop", "length"):
        raise CutOffError(f"vLLM ended an answer early: {reason}")
