"""A gRPC server without a model that answers Predict: for tests of the client alone. A text's answer is its length.

A text "BAD" fails its call with its place; with "WAIT" the call lasts until the client ends it,
with "CANCEL" the server ends it.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy

from miinb.errors import InvalidRequest
from miinb.messages import EngineInfo, Plan, PredictedEvent
from miinb.rpc import codec, failures


class PredictServer:
    """Serves on a loopback port. `calls` are the inputs of each call, `running` those in flight, `most` the most."""

    def __init__(self, task: str = "text-classification") -> None:
        self.info = EngineInfo(
            0, "m", task, "stand-in", "fp32", "cpu", 10, 10, 10, (), "", Plan("stand-in", "cpu", "fp32")
        )
        self.calls: list[int] = []
        self.running = self.most = self.described = 0
        self.least = 1  # calls that have to be in flight before the first is answered
        self._enough = threading.Event()
        self._lock = threading.Lock()
        handlers = {
            "Predict": grpc.unary_unary_rpc_method_handler(self._predict),
            "Describe": grpc.unary_unary_rpc_method_handler(self._describe),
        }
        self._server = grpc.server(
            ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", codec.MAX_REQUEST_BYTES)]
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(codec.SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait(10)

    def _describe(self, data: bytes, context: Any) -> bytes:
        self.described += 1
        return codec.encode_description({"name": "d", "info": dataclasses.asdict(self.info), "replicas": 1})

    def _predict(self, data: bytes, context: Any) -> bytes:
        inputs, options = codec.decode_predict(data)
        ended = threading.Event()
        with self._lock:
            self.calls.append(len(inputs))
            self.running += 1
            self.most = max(self.most, self.running)
            if self.most >= self.least:
                self._enough.set()
        if not context.add_callback(ended.set):  # it has ended already
            ended.set()
        texts = [next(iter(values.values())) for values in inputs]
        self._enough.wait(20)
        try:
            if "BAD" in texts:
                failure = failures.failure_of(InvalidRequest(f"inputs[{texts.index('BAD')}]: it is bad."))
                context.set_trailing_metadata(failure.metadata)
                context.abort(failure.code, failure.text)
            if "CANCEL" in texts:  # as a server that stops does
                context.abort(grpc.StatusCode.CANCELLED, "")
            if "WAIT" in texts:
                ended.wait(20)
            return codec.encode_predicted(self._answer(texts, options))
        finally:
            with self._lock:
                self.running -= 1

    def _answer(self, texts: list[str], options: dict[str, Any]) -> PredictedEvent:
        times = {"queue_s": 0.125, "preprocess_s": 0.25, "model_s": 0.5, "postprocess_s": 0.25}
        if self.info.task != "feature-extraction":
            outputs = [[{"label": "length", "score": float(len(text))}] for text in texts]
            return PredictedEvent(outputs, **times)
        counts = [len(text) if options.get("pooling") == "none" else 1 for text in texts]
        rows = [[len(text), row, 0.1] for text, count in zip(texts, counts, strict=True) for row in range(count)]
        return PredictedEvent(counts, **times, vectors=numpy.array(rows, numpy.float32).tobytes(), columns=3)
