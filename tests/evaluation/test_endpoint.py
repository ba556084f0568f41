"""The client against a real server that misbehaves."""

import base64
import copy
import io
import pickle
import random
import threading
import time
import traceback

import pytest
from PIL import Image

from rlfr_vlm.config import EndpointConfig, JudgeConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.server import endpoint as module
from rlfr_vlm.evaluation.server.endpoint import (
    ChatReply,
    ChatRequest,
    Endpoint,
    Failure,
    data_url,
    wait_seconds,
)
from rlfr_vlm.evaluation.server.wire import Secret, retry_after
from tests.evaluation.scripted_server import TRANSIENT, ScriptedServer

KEY = "sk-SENTINEL-0123456789abcdef"
LATE = ("slow", "dribble")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits, and nothing of the machine's own settings."""
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(module, "MAX_WAIT", 0.1)
    for name in ("OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(text, **settings):
    return ChatRequest(({"role": "user", "content": text},), **settings)


def make(server, **settings):
    return Endpoint(
        EndpointConfig(
            **{"model": "scripted", "api_base": server.api_base, "timeout": 20.0, **settings}
        )
    )


def test_every_request_is_answered_once_and_no_more_are_under_way_than_allowed():
    drawn = []

    def requests():
        for i in range(40):
            drawn.append(i)
            yield ask(f"question {i}", temperature=0.0, max_tokens=7, seed=i, extra={"top_k": 3})

    with ScriptedServer(pause=0.01) as server:
        endpoint = make(server, concurrency=4)
        found = {}
        for index, reply in endpoint.chat(requests()):
            assert index not in found
            found[index] = reply
            assert len(drawn) <= len(found) + 8  # drawn as they are needed
        assert server.most_in_flight <= 4
    assert {i: r.text for i, r in found.items()} == {i: f"question {i}" for i in range(40)}
    assert all(
        r.attempts == 1
        and r.finish_reason == "stop"
        and (r.prompt_tokens, r.response_tokens) == (5, 3)
        for r in found.values()
    )
    sent = next(b for b in server.bodies if b["messages"][0]["content"] == "question 7")
    assert sent == {
        "model": "scripted", "messages": [{"role": "user", "content": "question 7"}],
        "temperature": 0.0, "max_tokens": 7, "seed": 7, "top_k": 3,
    }  # fmt: skip


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_fault_is_tried_again(kind):
    with ScriptedServer(faults=lambda prompt, before: kind if before == 0 else None) as server:
        ((_, reply),) = make(server, timeout=1.0 if kind in LATE else 20.0).chat([ask("hello")])
        assert isinstance(reply, ChatReply) and reply.text == "hello" and reply.attempts == 2
        assert reply.seconds < 15


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_fault_that_stays_is_a_failure_of_its_kind(kind):
    with ScriptedServer(faults={kind: 1.0}) as server:
        ((_, failure),) = make(server, retries=1, timeout=0.4 if kind in LATE else 20.0).chat(
            [ask("hello")]
        )
    expected = {
        "429": "status", "429-bare": "status", "500": "status", "502": "status", "slow": "timeout", "dribble": "timeout",
        "half": "connection", "reset": "connection",
    }.get(kind, "body")  # fmt: skip
    assert isinstance(failure, Failure) and failure.kind == expected and failure.attempts == 2, (
        failure
    )
    assert server.met[kind] == 2 and len(failure.message) < 400 and "\n" not in failure.message


def test_nothing_is_lost_under_many_faults():
    with ScriptedServer(
        faults={kind: 0.4 / len(TRANSIENT) for kind in TRANSIENT}, seed=3
    ) as server:
        replies = dict(
            make(server, retries=12, concurrency=16, timeout=2.0).chat(
                ask(f"q{i}") for i in range(150)
            )
        )
    assert {i: r.text for i, r in replies.items()} == {i: f"q{i}" for i in range(150)}
    assert sum(r.attempts for r in replies.values()) == server.count.total()
    assert 0.3 < server.met.total() / server.count.total() < 0.5 and set(server.met) == set(
        TRANSIENT
    )


def test_retry_after_is_waited_for_and_capped(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAIT", 0.5)
    for header, low in (("0.3", 0.3), ("3600", 0.5)):
        with ScriptedServer(
            faults=lambda prompt, before: "429" if before == 0 else None, retry_after=header
        ) as server:
            ((_, reply),) = make(server).chat([ask("hello")])
        assert low <= reply.seconds < 15
    monkeypatch.setattr(module, "MAX_WAIT", 60.0)
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 1.0)
    assert all(
        0.75 * 2 ** (n - 1) <= wait_seconds(n, None) <= 1.25 * 2 ** (n - 1) for n in range(1, 6)
    )
    assert wait_seconds(50, None) == 60 and 10 <= wait_seconds(1, 10.0) <= 11
    assert (
        retry_after("12") == 12
        and retry_after("soon") is None
        and retry_after(None) is None
        and retry_after("-1") is None
    )
    assert (
        retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
        and retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    )


def test_a_refused_request_fails_at_once_with_the_servers_words_cut():
    with ScriptedServer(faults={"400": 1.0}) as server:
        ((_, failure),) = make(server).chat([ask("hello")])
    assert failure.kind == "refused" and failure.status == 400 and failure.attempts == 1
    assert failure.message.startswith("HTTP 400: too long too long") and len(failure.message) < 400


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        ScriptedServer() as other,
        ScriptedServer(
            faults={"redirect": 1.0}, elsewhere=other.api_base + "/chat/completions"
        ) as server,
    ):
        ((_, failure),) = make(server).chat([ask("hello")])
    assert failure.kind == "refused" and "redirect" in failure.message and failure.attempts == 1
    assert not other.paths


def test_a_dead_server_is_given_up():
    with ScriptedServer() as server:
        endpoint = make(server, retries=1, concurrency=4)
    start = time.monotonic()
    outcomes = dict(endpoint.chat(ask(f"q{i}") for i in range(500)))
    assert (
        len(outcomes) == 500
        and all(isinstance(f, Failure) for f in outcomes.values())
        and endpoint.down
    )
    kinds = [f.kind for f in outcomes.values()]
    assert 8 <= kinds.count("connection") <= 8 + 4 and kinds.count("breaker") >= 488
    assert time.monotonic() - start < 15
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint.probe()


def test_a_server_that_comes_back_is_asked_again_after_a_probe():
    with ScriptedServer(faults={"500": 1.0}) as server:
        endpoint = make(server, retries=0, concurrency=2)
        assert {f.kind for _, f in endpoint.chat(ask(f"q{i}") for i in range(50))} == {
            "status",
            "breaker",
        }
        server.faults = {}
        assert {f.kind for _, f in endpoint.chat([ask("more")])} == {"breaker"}
        endpoint.probe()
        assert [r.text for _, r in endpoint.chat([ask("more")])] == ["more"]


def test_refusals_of_single_requests_do_not_give_up_a_server():
    with ScriptedServer(
        faults=lambda prompt, before: "400" if "long" in prompt else None
    ) as server:
        outcomes = dict(
            make(server, concurrency=1).chat([*(ask(f"long {i}") for i in range(20)), ask("short")])
        )
    assert outcomes[20].text == "short"


def test_what_is_under_way_ends_with_its_reader():
    threads = threading.active_count()
    with ScriptedServer(faults={"slow": 1.0}) as server:
        endpoint = make(server, timeout=30, concurrency=4)

        def requests():
            yield ask("a")
            yield ask("b")
            raise KeyError("the caller's own fault")

        start = time.monotonic()
        with pytest.raises(KeyError, match="own fault"):
            list(endpoint.chat(requests()))
        server.faults = lambda prompt, before: None if "fast" in prompt else "slow"
        for _ in endpoint.chat([ask("fast"), ask("c")]):
            break
        assert time.monotonic() - start < 15
    time.sleep(0.2)
    assert threading.active_count() <= threads + 1


def test_addresses(monkeypatch):
    def refused(match, **settings):
        with pytest.raises(UserError, match=match) as caught:
            Endpoint(JudgeConfig(model="m", **settings))
        assert "eval.judge" in str(caught.value) and "hunter2" not in str(caught.value)

    refused("OPENAI_API_BASE")
    refused("tunnel", api_base="http://node17:8000/v1")
    refused("user, password", api_base="https://me:hunter2@host/v1")
    refused("user, password", api_base="https://host/v1?key=hunter2")
    refused("not of the form", api_base="localhost:8000/v1")
    refused("needs a key", api_base="https://api.example.com/v1")
    refused("needs a key", api_base="https://127.0.0.1.example.com/v1")
    refused("tunnel", api_base="http://localhost.example.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2 is\nno key")
    refused("spaces", api_base="https://api.example.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    monkeypatch.setenv("OPENAI_API_BASE", "https://api.example.com/v1/chat/completions")
    endpoint = Endpoint(EndpointConfig(model="m"))
    assert endpoint.api_base == "https://api.example.com/v1" and not endpoint.loopback
    assert all(
        Endpoint(EndpointConfig(model="m", api_base=f"http://{host}:1/v1")).loopback
        for host in ("localhost", "127.0.0.9", "[::1]")
    )
    with pytest.raises(UserError, match=r"eval.endpoint.model"):
        Endpoint(EndpointConfig())


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ScriptedServer() as server:
        assert [r.text for _, r in make(server).chat([ask("hello")])] == ["hello"]


def test_the_probe_says_what_to_do(monkeypatch):
    with ScriptedServer(models=("small", "large")) as server:
        with pytest.raises(
            UserError, match=r"does not serve `scripted` but small, large; set eval.endpoint.model"
        ):
            make(server).probe()
        make(server, model="large").probe()
    with ScriptedServer(models=None) as server:
        make(server).probe()  # no list: the test request decides
        assert server.bodies[-1]["max_tokens"] == 1
    with ScriptedServer(key=KEY) as server:
        with pytest.raises(
            UserError, match="does not accept requests without a key; set OPENAI_API_KEY"
        ):
            make(server).probe()
        monkeypatch.setenv("OPENAI_API_KEY", "another-key-altogether")
        with pytest.raises(UserError, match="does not accept the key in OPENAI_API_KEY") as caught:
            make(server).probe()
        assert "another-key" not in str(caught.value)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        make(server).probe()
    with (
        ScriptedServer(faults={"500": 1.0}) as server,
        pytest.raises(UserError, match=r"did not answer a test request.*out of luck"),
    ):
        make(server).probe()
    with pytest.raises(UserError, match=r"cannot be reached \(ConnectError"):
        make(server).probe()


def test_a_secret_shows_itself_nowhere():
    secret = Secret(KEY)
    assert secret.reveal() == KEY
    assert all(
        KEY not in text
        for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}", str(dir(secret)))
    )
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.deepcopy(secret)


def test_the_key_is_sent_and_else_found_nowhere(monkeypatch, caplog, tmp_path):
    """Not in logs at their most talkative, failures, exceptions with all local variables, or the
    objects' own descriptions.
    """
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", KEY)
    texts = []
    with ScriptedServer(key="something else entirely") as server:
        endpoint = make(server, key_env="MY_KEY")
        ((_, failure),) = endpoint.chat([ask("hello")])
        assert failure.status == 401 and "<key>" in failure.message
        texts += [
            repr(failure),
            repr(endpoint),
            repr(vars(endpoint)),
            endpoint.cfg.model_dump_json(),
            repr(endpoint._key()),
        ]
        try:
            endpoint.probe()
        except UserError as error:
            report = traceback.TracebackException.from_exception(error, capture_locals=True)
            texts.append("".join(report.format()))
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert not any(KEY in text for text in [*texts, caplog.text])


def test_the_trainers_random_numbers_are_left_alone():
    state = random.getstate()
    with ScriptedServer(faults={"500": 1.0}) as server:
        list(make(server, retries=2).chat([ask("hello")]))
    assert random.getstate() == state


def test_pictures_arrive_as_they_are():
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "What is this?"},
    ]
    with ScriptedServer(
        answer=lambda request: request["messages"][0]["content"][0]["image_url"]["url"]
    ) as server:
        ((_, reply),) = make(server).chat([ChatRequest(({"role": "user", "content": parts},))])
    found = Image.open(
        io.BytesIO(base64.b64decode(reply.text.removeprefix("data:image/png;base64,")))
    )
    assert found.tobytes() == image.tobytes() and found.size == image.size
    assert data_url(image.convert("CMYK")).startswith("data:image/png;base64,")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_picture_keeps_its_mode_and_its_transparency(mode):
    noise = [Image.effect_noise((40, 30), 80) for _ in range(4)]
    image = Image.merge("RGBA", noise).convert(mode)
    url = data_url(image)
    found = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (found.mode, found.tobytes()) == (mode, image.tobytes())
