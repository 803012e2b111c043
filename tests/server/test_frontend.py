"""The frontend's behavior, seen by a client and by its ranks: real processes and sockets, a rank without a model."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from miinb import errors
from miinb.client import Client
from miinb.config import DeploymentConfig
from miinb.queries import query
from miinb.rpc import codec, failures
from miinb.rpc import inference_pb2 as pb
from miinb.server import service
from miinb.server.balancer import Balancer
from miinb.server.frontend import Frontend, StatusPipe
from miinb.server.ipc import RankSocket
from miinb.server.text import TextCodec
from tests.frontend_process import ROOT, FrontendProcess, make, wait_for
from tests.tiny_tokenizers import byte_level

PROMPT = "Once upon a time 日本語 😀."


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Any]:
    """Makes frontends of the test's own configuration."""
    made: list[FrontendProcess] = []

    def start(**config: Any) -> FrontendProcess:
        made.append(make(tmp_path / str(len(made)), **config))
        return made[-1]

    yield start
    for process in made:
        process.close()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontendProcess]:
    """A frontend with a stand-in classifier: a text's label is its first token."""
    process = make(tmp_path_factory.mktemp("classifier") / "frontend")
    process.rank(task="text-classification")
    yield process
    process.close()


def tokens_of(frontend: FrontendProcess, text: str) -> int:
    return len(TextCodec.load(frontend.folder / "tokenizer").encode(text))


def test_an_answer_has_text_counts_reason_and_times(frontend: FrontendProcess, client: Client) -> None:
    count = tokens_of(frontend, PROMPT)
    result = client.generate(PROMPT, max_new_tokens=3 * count)
    assert result.texts == (PROMPT * 3,)
    assert result.finish_reasons == ("length",)
    assert (result.usage.prompt_tokens, result.usage.output_tokens) == (count, 3 * count)
    assert len(result.token_ids[0]) == 3 * count
    timing = result.timing
    assert 0 < timing.tokenize_s < timing.e2e_s
    assert 0 < timing.model_s < timing.e2e_s
    assert 0 < timing.detokenize_s < timing.e2e_s
    assert 0 <= timing.queue_s < timing.ttft_s <= timing.e2e_s


def test_a_stop_string_ends_the_row_in_the_rank_and_is_not_shown(frontend: FrontendProcess, client: Client) -> None:
    before = len(frontend.told("cancel"))
    result = client.generate("SLOW abcdef", max_new_tokens=1000, stop=["zz", "ef"])
    assert result.text == "SLOW abcd"
    assert result.finish_reasons == ("stop",)
    assert result.usage.output_tokens == len(result.token_ids[0]) <= tokens_of(frontend, "SLOW abcdef")
    assert [row["reason"] for row in frontend.told("cancel")[before:]] == ["stop"]


def test_text_held_back_for_a_stop_string_comes_at_the_end(client: Client) -> None:
    assert client.generate("abc", max_new_tokens=3, stop="cx").text == "abc"


@pytest.mark.parametrize("slow", [False, True])
def test_no_part_of_a_stop_string_is_streamed_wherever_tokens_and_characters_end(client: Client, slow: bool) -> None:
    text = "SLOW a☃b" if slow else "le café ☃☃🌰b 日本語 aaab 😀."
    whole = text * 4
    for start in range(0, len(text), 5 if slow else 1):
        for size in (1, 2, 5):
            stop = whole[start : start + size]
            stops = [stop, stop[1:]] if size > 1 else [stop]  # they overlap
            stream = client.stream(text, max_new_tokens=200, stop=stops)
            shown = "".join(chunk.text for chunk in stream)
            assert shown == whole[: min(whole.index(one) for one in stops)], stops
            assert stream.result is not None
            assert stream.result.finish_reasons == ("stop",)
            assert stream.result.text == shown


def test_a_stop_string_ends_its_row_and_the_others_go_on(client: Client) -> None:
    result = client.generate(["a☃b", "xyz", "b☃"], max_new_tokens=12, stop="☃")
    assert result.texts == ("a", "xyz" * 4, "b")
    assert result.finish_reasons == ("stop", "length", "stop")


def test_sequences_have_following_seeds(frontend: FrontendProcess, client: Client) -> None:
    before = len(frontend.told("submit"))
    result = client.generate("the fox", max_new_tokens=2, do_sample=True, num_return_sequences=3, seed=7)
    assert len(result.texts) == len(result.finish_reasons) == 3
    assert [row["seed"] for row in frontend.told("submit")[before:]] == [7, 8, 9]
    assert result.seeds == (7,)
    assert result.usage.output_tokens == 6


def test_a_seed_is_drawn_and_told(frontend: FrontendProcess, client: Client) -> None:
    seeds = [client.generate("the fox", max_new_tokens=1, do_sample=True).seeds[0] for _ in range(3)]
    assert [row["seed"] for row in frontend.told("submit")[-3:]] == seeds
    assert len(set(seeds)) == 3


def test_logprobs_belong_to_their_tokens(client: Client) -> None:
    result = client.generate(PROMPT, max_new_tokens=30, logprobs=2)
    assert tuple(entry.token_id for entry in result.logprobs[0]) == result.token_ids[0]
    assert all(len(entry.top) == 2 == len(entry.top_texts) for entry in result.logprobs[0])
    assert "".join(entry.text for entry in result.logprobs[0]).strip() == result.text.strip()


def test_full_text_begins_with_the_prompt(client: Client) -> None:
    assert client.generate("abc", max_new_tokens=3, return_full_text=True).text == "abcabc"


def test_a_chat_goes_through_the_models_template(client: Client) -> None:
    result = client.chat([{"role": "user", "content": "Hi"}], max_new_tokens=200)
    assert "Hi<|assistant|>\n" in result.text


def raw(frontend: FrontendProcess, data: bytes, path: str = codec.GENERATE, **options: Any) -> list[bytes]:
    """A call without this project's client."""
    with grpc.insecure_channel(frontend.address) as channel:
        if path != codec.GENERATE:
            return [channel.unary_unary(path)(data, timeout=20, **options)]
        return list(channel.unary_stream(path)(data, timeout=20, **options))


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (pb.GenerateRequest(prompt=""), "prompt"),
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(prompt="a\0b"), "NUL"),
        (pb.GenerateRequest(chat=pb.Chat()), "messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="tool", content="x")])), "no role 'tool'"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="usr", content="x")])), "Did you mean 'user'"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="{{ 7*7 }}", content="x")])), "{{ 7*7 }}"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="assistant", content="x")])), "the user's"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="")])), "empty"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role="user", content="a\0")])), "NUL"),
        (pb.GenerateRequest(prompt="x", session_id="none"), "does not exist"),
        (pb.GenerateRequest(prompt="x", parameters_json='{"temprature": 1}'), "temprature"),
        (pb.GenerateRequest(prompt="x", parameters_json='{"temperature": NaN}'), "temperature"),
        (pb.GenerateRequest(prompt="x", parameters_json='{"eos_token_id": 1000}'), "eos_token_id"),
        (pb.GenerateRequest(prompt="x", parameters_json='{"logit_bias": {"-1": 1.0}}'), "logit_bias"),
        (pb.GenerateRequest(prompt="x", parameters_json='{"max_new_tokens": 4096}'), "max_new_tokens=4095"),
        (pb.GenerateRequest(prompt="the fox " * 4_000), "context"),
        (pb.GenerateRequest(prompt="the fox " * 60_000), "tokens"),
        (pb.GenerateRequest(prompt="x" * 2_000_000), "tokens"),
        (b"\x0a\x02\xff\xfe", "cannot be read"),
        (b"\xff" * 100, "cannot be read"),
    ],
)
def test_a_wrong_request_is_refused_before_the_queue(frontend: FrontendProcess, request_: Any, named: str) -> None:
    before = len(frontend.told("submit"))
    data = request_ if isinstance(request_, bytes) else request_.SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        raw(frontend, data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in failures.error_of(caught.value).line()
    assert len(frontend.told("submit")) == before


def test_a_request_above_the_limit_is_refused(frontend: FrontendProcess, client: Client) -> None:
    with pytest.raises(errors.InvalidRequest, match="larger"):
        client.generate("x" * (17 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        raw(frontend, b"", metadata=(("x", "y" * 65536),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.generate("abc", max_new_tokens=3).text == "abc"


def test_junk_on_the_socket_harms_nobody(frontend: FrontendProcess, client: Client) -> None:
    path = frontend.address.removeprefix("unix:")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n", b"\x00" * 100_000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            try:
                sock.sendall(junk)
            except BrokenPipeError:
                continue
    assert client.generate("abc", max_new_tokens=3).text == "abc"


def test_sockets_are_the_users_alone(frontend: FrontendProcess) -> None:
    for name in ("rpc.sock", "direct.sock", "engine.sock"):
        assert (frontend.folder / name).stat().st_mode & 0o777 == 0o600
    assert not psutil.Process(frontend.process.pid).net_connections("inet")


def test_answers_of_many_requests_do_not_mix(client: Client) -> None:
    prompts = [f"prompt {number} of many: {'xyz'[number % 3] * (number % 7)}" for number in range(200)]
    results = client.generate(prompts, max_new_tokens=40)
    for prompt, text in zip(prompts, results.texts, strict=True):
        assert (prompt * 5).startswith(text)
    assert len(results.frame) == 200


def test_tokens_merge_into_chunks_and_many_streams_are_paced(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank(step_s=0.005)
    with frontend.client() as client:
        streams = [client.stream("abc", max_new_tokens=400) for _ in range(40)]
        with ThreadPoolExecutor(40) as pool:
            results = list(pool.map(lambda stream: stream.result, streams))
    assert {result.usage.output_tokens for result in results} == {400}
    chunks = sum(result.rows[0]["chunk_count"] for result in results)
    assert chunks < 0.6 * 40 * 400, "25 a second each, but for the time in which few streams run"


def test_a_canceled_stream_is_told_to_the_rank_at_once(frontend: FrontendProcess, client: Client) -> None:
    before = len(frontend.told("cancel"))
    stream = client.stream("SLOW abc", max_new_tokens=1000)
    next(stream)
    stream.cancel()
    wait_for(lambda: len(frontend.told("cancel")) == before + 1, "the cancel")
    assert stream.result.finish_reasons == ("cancelled",)
    wait_for(lambda: frontend.running() == 0, "the end of the request")


def test_a_killed_client_frees_its_row(frontend: FrontendProcess) -> None:
    before = len(frontend.told("cancel"))
    code = (
        "import sys; from miinb.client import Client\n"
        "for chunk in Client(sys.argv[1]).stream('SLOW abc', max_new_tokens=1000): print(chunk.text, flush=True)"
    )
    victim = subprocess.Popen([sys.executable, "-c", code, frontend.address], cwd=ROOT, stdout=subprocess.PIPE)
    assert victim.stdout is not None
    with victim.stdout as out:
        assert out.readline()
        victim.kill()
        victim.wait(10)
    wait_for(lambda: len(frontend.told("cancel")) == before + 1, "the cancel")


def test_a_deadline_ends_a_running_row(frontend: FrontendProcess, client: Client) -> None:
    before = len(frontend.told("cancel"))
    with pytest.raises(errors.DeadlineExceeded):
        client.generate("SLOW abc", max_new_tokens=1000, timeout_s=0.3)
    wait_for(lambda: len(frontend.told("cancel")) == before + 1, "the cancel")


def test_a_row_that_fails_fails_alone(client: Client) -> None:
    other = client.stream("SLOW abc", max_new_tokens=20)
    with pytest.raises(errors.NonFinite, match=r"NaN. Try fp32."):
        client.generate("NAN abc", max_new_tokens=20)
    assert len(other.result.token_ids[0]) == 20


def test_a_full_queue_refuses_and_goes_on(fresh: Any) -> None:
    frontend = fresh(options={"max_queue": 1})
    frontend.rank(max_batch=1)
    with frontend.client() as client:
        first = client.stream("SLOW abc", max_new_tokens=1000)
        next(first)
        second = client.stream("abc", max_new_tokens=3)
        wait_for(lambda: len(frontend.told("submit")) == 2, "the second request in the queue")
        with pytest.raises(errors.QueueFull, match="max_queue"):
            client.generate("abc", max_new_tokens=3)
        first.cancel()
        assert second.result.text == "abc"
        assert client.generate("abc", max_new_tokens=3).text == "abc"


def test_a_deadline_holds_in_the_queue(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank(max_batch=1)
    with frontend.client() as client:
        first = client.stream("SLOW abc", max_new_tokens=1000)
        next(first)
        waiting = client.stream("abc", max_new_tokens=3, timeout_s=0.3)
        with pytest.raises(errors.DeadlineExceeded):
            next(waiting)
        (_, submitted) = frontend.told("submit")
        wait_for(lambda: [row["row_id"] for row in frontend.told("cancel")] == [submitted["row_id"]], "the cancel")
        first.cancel()


def test_a_replica_that_dies_takes_only_its_own_requests(fresh: Any) -> None:
    frontend = fresh()
    first = frontend.rank(0)
    with frontend.client() as client:
        dying = client.stream("SLOW abc", max_new_tokens=1000)  # on replica 0
        next(dying)
        second = frontend.rank(1)
        living = client.stream("SLOW abc", max_new_tokens=30)  # on replica 1, which has fewer rows
        next(living)
        assert [row["replica"] for row in frontend.told("submit")] == [0, 1]
        first.kill()
        with pytest.raises(errors.Unavailable, match="replica"):
            _ = dying.result
        assert len(living.result.token_ids[0]) == 30
        assert client.health()
        second.kill()
        wait_for(lambda: not client.health(), "health without a replica")
        with pytest.raises(errors.Unavailable):
            client.generate("abc", max_new_tokens=1, timeout_s=3)
        frontend.rank(0)
        assert client.health()


def test_tcp_needs_the_token_on_every_method(fresh: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tcp"
    byte_level(folder / "tokenizer")
    (folder / "token").write_text("secret-token")
    frontend = FrontendProcess(folder, port=0)
    try:
        frontend.rank()
        address = frontend.ready["tcp"]
        listening = psutil.Process(frontend.process.pid).net_connections("inet")
        assert {entry.laddr.ip.removeprefix("::ffff:") for entry in listening} == {"127.0.0.1"}
        methods = (codec.GENERATE, codec.PREDICT, codec.DESCRIBE, "/grpc.health.v1.Health/Check", "/a.b.C/Unknown")
        for token in (None, "wrong", "secret-token-and-more"):
            metadata = [("authorization", f"Bearer {token}")] if token else []
            with grpc.insecure_channel(address) as channel:
                for method in methods:
                    with pytest.raises(grpc.RpcError) as caught:
                        channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
        client = Client(address, "secret-token")
        assert client.generate("abc", max_new_tokens=3).text == "abc"
        assert client.health()
        client.close()
    finally:
        frontend.close()


def test_sigterm_drains(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank()
    with frontend.client() as client, frontend.client() as late:
        streams = [client.stream("SLOW abc", max_new_tokens=40) for _ in range(4)]
        for stream in streams:
            next(stream)
        assert late.health()
        frontend.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not late.health(), "health while draining")
        with pytest.raises(errors.Unavailable):
            late.generate("abc", max_new_tokens=1, timeout_s=1)
        assert [len(stream.result.token_ids[0]) for stream in streams] == [40] * 4
        assert frontend.process.wait(10) == 0
    assert not (frontend.folder / "rpc.sock").exists()
    assert [rank.wait(10) for rank in frontend.ranks] == [0], "a rank ends with its frontend"


def test_requests_of_a_deployment_that_is_stopped_are_told_so(fresh: Any) -> None:
    frontend = fresh()
    rank = frontend.rank()
    with frontend.client() as client:
        stream = client.stream("SLOW abc", max_new_tokens=1000)
        next(stream)
        frontend.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.health(), "health while draining")
        rank.kill()
        with pytest.raises(errors.Unavailable, match="was stopped while this request ran"):
            _ = stream.result


def test_a_second_sigterm_does_not_wait(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank()
    with frontend.client() as client:
        stream = client.stream("SLOW abc", max_new_tokens=1000)
        next(stream)
        frontend.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        frontend.process.send_signal(signal.SIGTERM)
        assert frontend.process.wait(10) == 0
        with pytest.raises(errors.RequestError):
            _ = stream.result


def test_activity_is_told(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank()
    seen: list[dict[str, int]] = []

    def read() -> None:
        for line in frontend.status:
            seen.append(json.loads(line)["activity"])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    with frontend.client() as client:
        stream = client.stream("SLOW abc", max_new_tokens=1000)
        next(stream)
        wait_for(lambda: seen and seen[-1]["in_flight"] == 1, "activity of the stream")
        stream.cancel()
        wait_for(lambda: seen[-1] == {"in_flight": 0, "queued": 0, "requests": 1, "replicas": 1}, "the end")
    frontend.process.kill()
    thread.join(10)


def test_predict_goes_to_the_replica_and_back(fresh: Any) -> None:
    frontend = fresh()
    frontend.rank(task="text-classification")
    text = TextCodec.load(frontend.folder / "tokenizer")
    with frontend.client() as client:
        first, second = (text.encode(text_)[0] for text_ in ("xyz", "日本"))
        found = client.predict(["xyz", "日本"], top_k=2)
        assert [[one.label for one in row] for row in found] == [[f"LABEL_{first}"] * 2, [f"LABEL_{second}"] * 2]
        assert frontend.told("encode")[-1]["options"] == {"function": "softmax", "top_k": 2}
        assert frontend.told("encode")[-1]["lengths"] == [len(text.encode(text_)) for text_ in ("xyz", "日本")]
        with pytest.raises(errors.InvalidRequest, match=r"predict\(\)"):
            client.generate("abc")
        assert query(client, {"query": "xyz"}, {}).response == [{"label": f"LABEL_{first}", "score": first}]
        assert len(query(client, {"query": ["abc", "d"]}, {}).response) == 2


@pytest.mark.parametrize(
    ("inputs", "options", "named"),
    [
        ([{"querry": "abc"}], {}, r"inputs\[0\]: 'querry' is not one of query. Did you mean 'query'"),
        (["abc", ""], {}, r"inputs\[1\]: query is empty"),
        (["abc", "a\0"], {}, r"inputs\[1\]: query holds a NUL"),
        (["abc", "x" * 5000], {}, r"inputs\[1\]: it has 5000 tokens, but the model takes 4096. .*truncation=True"),
        (["abc"], {"topk": 2}, "text-classification has no option 'topk'. Did you mean 'top_k'"),
        (["abc"], {"top_k": 0}, "top_k: 0 is below 1"),
        (["abc"], {"top_k": True}, "top_k: True is not a whole number"),
        (["abc"], {"function_to_apply": "softmx"}, "function_to_apply: 'softmx' is none of .*Did you mean 'softmax'"),
        (["abc"], {"truncation": 1}, "truncation: 1 is not True or False"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_replica(
    classifier: FrontendProcess, inputs: list[Any], options: dict[str, Any], named: str
) -> None:
    before = len(classifier.told("encode"))
    with classifier.client() as client:
        data = codec.encode_predict([{"query": one} if isinstance(one, str) else one for one in inputs], options)
        with pytest.raises(grpc.RpcError) as caught:
            raw(classifier, data, codec.PREDICT)
        assert re.search(named, failures.error_of(caught.value).line())
        assert client.predict("abc")
    assert len(classifier.told("encode")) == before + 1


def test_many_predictions_at_once_do_not_mix(classifier: FrontendProcess) -> None:
    text = TextCodec.load(classifier.folder / "tokenizer")
    texts = [f"{letter} {'fox ' * (50 * (number % 5))}" for number, letter in enumerate("abcdefghijklmnop" * 4)]
    with classifier.client() as client, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(client.predict, texts))
    wanted = [f"LABEL_{text.encode(one)[0]}" for one in texts]
    assert [answers[0][0].label for answers in found] == wanted


def test_predictions_go_to_the_replica_with_fewer_tokens_and_end_with_it(fresh: Any) -> None:
    frontend = fresh()
    ranks = [frontend.rank(number, task="text-classification") for number in range(2)]
    ranks[0].send_signal(signal.SIGSTOP)
    try:
        with frontend.client() as client, ThreadPoolExecutor(8) as pool:
            waiting = pool.submit(client.predict, "fox " * 30)  # on replica 0, which does not answer
            wait_for(lambda: frontend.running() == 1, "the first request")
            time.sleep(0.2)
            for _ in range(3):
                assert client.predict("fox " * 10)
            assert {row["replica"] for row in frontend.told("encode")} == {1}
            ranks[0].kill()
            with pytest.raises(errors.Unavailable, match="replica"):
                waiting.result(20)
            ranks[1].send_signal(signal.SIGSTOP)
            with pytest.raises(errors.DeadlineExceeded):
                client.predict("fox", timeout_s=5.0)  # time enough to reach the rank on a busy machine
            ranks[1].send_signal(signal.SIGCONT)
            wait_for(lambda: frontend.told("cancel"), "the cancel")
            assert client.predict("fox")
            assert frontend.running() == 0
    finally:
        for rank in ranks:
            rank.kill()


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: list[tuple[object, ...]] = []

    class NeverReads:
        async def write(self, data: bytes) -> None:
            await asyncio.sleep(60)

        async def abort(self, *status: object) -> None:
            aborted.append(status)
            raise grpc.aio.AbortError

        def time_remaining(self) -> None:
            return None

    async def call() -> None:
        inference = service.Inference(Balancer(lambda _: None, max_queue=1), "name")
        monkeypatch.setattr(inference, "_run_generate", lambda data, writer, _: writer.write(data))
        task = asyncio.ensure_future(inference._generate(b"", NeverReads()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inference.end_unread()
        assert not aborted
        monkeypatch.setattr(service, "MAX_UNREAD_S", -1.0)
        inference.end_unread()
        with pytest.raises(grpc.aio.AbortError):
            await task
        assert (inference.counters.in_flight, inference.counters.cancelled) == (0, 1)

    asyncio.run(call())
    assert aborted[0][0] is grpc.StatusCode.CANCELLED


def test_a_client_without_grpc_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(message: bytes, tail: bytes = b"", /) -> None:
        await asyncio.sleep(60)

    async def run_images(data: bytes, writer: service.Writer, deadline: float) -> bytes:
        await writer.write(b"picture")
        return b""

    async def call() -> None:
        inference = service.Inference(Balancer(lambda _: None, max_queue=1), "name")
        monkeypatch.setattr(inference, "_run_images", run_images)
        monkeypatch.setattr(service, "MAX_UNREAD_S", -1.0)
        task = asyncio.ensure_future(inference.images(b"", 60.0, never))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inference.end_unread()
        with pytest.raises(errors.Cancelled, match="did not read"):
            await task
        assert (inference.counters.in_flight, inference.counters.cancelled) == (0, 1)
        assert not inference._writers

    asyncio.run(call())


def test_ranks_that_come_late_find_a_listener(tmp_path: Path) -> None:
    """uvloop ends listeners that are collected: a large model loads for minutes."""

    async def run() -> None:
        frontend = Frontend(DeploymentConfig.parse({"model": "m"}), tmp_path, "name", 0.0, StatusPipe())
        await frontend.start()
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0)
        RankSocket.connect(tmp_path / "engine.sock", timeout_s=0.0).close()
        for server in frontend._servers:
            await server.stop(0)

    uvloop.run(run())


def test_a_client_that_pings_often_is_not_thrown_out(frontend: FrontendProcess) -> None:
    """Under load pings may come in bunches, and after the last answer; a GOAWAY would end all calls of the channel."""
    options = {
        "grpc.keepalive_time_ms": 50,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.http2.min_time_between_pings_ms": 10,
        "grpc.use_local_subchannel_pool": 1,
    }
    with grpc.insecure_channel(frontend.address, options=tuple(options.items())) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(4)  # gRPC sends one a second at most
        assert watch.is_active(), watch.details()
        watch.cancel()
