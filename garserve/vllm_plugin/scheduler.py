"""vLLM's scheduler, made patient: a request whose image finds no room in a step waits for it in the queue.

vLLM gives such a request the few tokens before its image and counts it as running from then on. A running request
never looks into the prefix cache again, so questions about one image that are asked together, and admitted so, each
compute the whole image's tokens for themselves. In the queue they find them in the cache in the next step. (While it
waits there, vLLM 0.32 admits nobody behind it, and 0.33 whoever fits.)
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from garserve.vllm_plugin.parent import follow_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_QUEUED = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class _Patience:
    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *rest: Any, **named: Any
    ) -> tuple[Any, ...]:
        """Take vLLM's choice; where it would admit a request only up to its image, admit nothing of it.

        A request that got as far as a later item is left alone: vLLM keeps the items before it for the request from
        here on, and in a queue it would keep them from those that need the room. So is one that nothing runs beside,
        or that no step takes with its image at once (`disable_chunked_mm_input`): it would wait for nothing.
        """
        chosen = super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *rest, **named
        )
        inputs, tokens, *others = chosen
        cut = 0 < tokens < num_new_tokens and request.status in _QUEUED
        whole_items = self.scheduler_config.disable_chunked_mm_input  # type: ignore[attr-defined]
        if not self.running or whole_items:  # type: ignore[attr-defined]
            return chosen
        if cut and num_computed_tokens + tokens == request.mm_features[0].mm_position.offset:
            return (inputs, 0, *others)
        return chosen


class PatientScheduler(_Patience, Scheduler):
    """The scheduler of engines that wait for a step's tokens before they plan the next one."""


class PatientAsyncScheduler(_Patience, AsyncScheduler):
    """The scheduler of engines that plan a step ahead."""


def make_scheduler(*, vllm_config: "VllmConfig", **rest: Any) -> Scheduler:
    """Return the patient form of the scheduler that vLLM would take (its `scheduler_cls` may be any callable).

    It is the one thing of garserve's that an engine makes in the process of its core.
    """
    follow_parent()
    kind = PatientAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PatientScheduler
    return kind(vllm_config=vllm_config, **rest)
