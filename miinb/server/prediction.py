"""A predict request on its way: checked and tokenized, computed by a replica, made into answers."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from miinb.errors import InvalidRequest, RequestError, from_name
from miinb.messages import EncodedEvent, EncodeRequest, FailedEvent, PredictedEvent
from miinb.rpc import codec
from miinb.server.awake import Awake
from miinb.server.balancer import Balancer, Replica, RowEvent
from miinb.server.encoders.registry import ENCODER_TASKS
from miinb.server.encoders.request import Answers, Asked, Prepared, checked_inputs, checked_options, find_task
from miinb.server.encoders.tokenization import EncoderText, Text
from miinb.spinning import spin_s

#: Work on more tokens or bytes of results than these is done in a thread, so that the loop goes on with the others'.
LARGE_TOKENS = 8192
LARGE_BYTES = 1 << 16
#: Most tokens of a request, those of overlapping windows counted as often as they are in one.
MAX_TOKENS = 1 << 22

_T = TypeVar("_T")


async def predict(
    data: bytes, balancer: Balancer, awake: Awake, *, t_submit: float, deadline: float, alone: bool
) -> bytes:
    """The answer of a predict request, both as bytes.

    Args:
        data: the request.
        balancer: the replicas.
        awake: of the loop, which is to be quick when the replica answers and the client asks again.
        t_submit: when it came, time.monotonic().
        deadline: when it has to be answered.
        alone: no other request is being served.

    Raises:
        RequestError: it was refused, or failed.
    """
    inputs, options = codec.decode_predict(data)
    replica = await balancer.pick(1)
    task = find_task(replica.info)
    checked_inputs(inputs, task)
    text = replica.text
    if not isinstance(text, EncoderText):
        raise InvalidRequest(f"This deployment serves {task.name}.", hint=f"Use {task.asked_by}().")
    asked = Asked(inputs, checked_options(options, task), text, replica.info)
    kind = ENCODER_TASKS[task.name]
    encodings = await text.encode(texts_of(asked), offsets=kind.offsets, alone=alone)
    lengths = [len(encoding) for encoding in encodings]
    if 0 in lengths:
        place = lengths.index(0)
        raise InvalidRequest(f"inputs[{place}]: the model's tokenizer finds no token in it.", hint="Give other text.")
    tokens = sum(lengths)
    prepared = await _run(lambda: _checked(kind.prepare(asked, encodings), asked), tokens > LARGE_TOKENS)
    replica = await balancer.pick(1)  # it may have gone meanwhile, or another have less to do
    t_sent = time.monotonic()
    awake.for_the_next(spin_s(replica.info.device))
    event = await _computed(prepared, balancer.next_row_id(), replica, t_sent, deadline)
    t_done = time.monotonic()
    awake.for_the_next(spin_s(replica.info.device))

    def finish() -> bytes:
        answers = _answers(prepared, event)
        times = (event.queue_s, t_sent - t_submit, event.model_s, time.monotonic() - t_done)
        return codec.encode_predicted(PredictedEvent(answers.outputs, *times, answers.vectors, answers.columns))

    return await _run(finish, len(event.values) > LARGE_BYTES)


async def _run(work: Callable[[], _T], large: bool) -> _T:
    return await asyncio.to_thread(work) if large else work()


def texts_of(asked: Asked) -> Sequence[Text]:
    """What of a request is tokenized: texts, or pairs of question and context in the model's order."""
    names = find_task(asked.info).inputs
    if len(names) == 1:
        (name,) = names
        return [values[name] for values in asked.inputs]
    question, context = names if asked.text.question_first else names[::-1]
    return [(values[question], values[context]) for values in asked.inputs]


def _checked(prepared: Prepared, asked: Asked) -> Prepared:
    """Refuse too many tokens, and those that would end the rank: the model lacks them. Raises InvalidRequest."""
    vocab_size = asked.info.vocab_size
    if (tokens := sum(map(len, prepared.sequences))) > MAX_TOKENS:
        raise InvalidRequest(
            f"inputs: {len(prepared.sequences)} windows with {tokens} tokens in all; at most {MAX_TOKENS} are taken.",
            hint="Send fewer or shorter texts at once, or windows that overlap less.",
        )
    if asked.text.may_exceed(vocab_size):
        highest = max(map(max, prepared.sequences))
        if highest >= vocab_size:
            token = asked.text.tokenizer.id_to_token(highest)
            raise InvalidRequest(f"inputs: the model, with {vocab_size} tokens, does not know the token {token!r}.")
    return prepared


async def _computed(prepared: Prepared, row_id: int, replica: Replica, t_sent: float, deadline: float) -> EncodedEvent:
    """What a replica computes for a request. Raises RequestError."""
    request = EncodeRequest(
        row_id=row_id,
        token_ids=array("i", chain.from_iterable(prepared.sequences)),
        lengths=array("i", map(len, prepared.sequences)),
        t_submit=t_sent,
        type_ids=prepared.type_ids,
        wanted=prepared.wanted,
        options=prepared.options,
        deadline=deadline,
    )
    done: asyncio.Future[RowEvent] = asyncio.get_running_loop().create_future()
    try:
        replica.submit(request, lambda event: None if done.done() else done.set_result(event))
        if len(request.token_ids) <= LARGE_TOKENS:
            prepared.meanwhile()
        event = await done
    finally:
        replica.cancel(row_id)
    if isinstance(event, FailedEvent):
        raise from_name(event.error, event.message, hint=event.hint)
    if not isinstance(event, EncodedEvent):
        raise RequestError("The replica did not answer as it should.")
    return event


def _answers(prepared: Prepared, event: EncodedEvent) -> Answers:
    """Raises RequestError where the numbers are not those of the request."""
    columns = max(1, event.columns)
    try:
        values = np.frombuffer(event.values, np.float32).reshape(-1, columns)
        ids = np.frombuffer(event.ids, np.int32).reshape(-1, columns) if event.ids else None
    except ValueError as error:
        raise RequestError("The replica's answer cannot be read.") from error
    return prepared.finish(values, ids)
