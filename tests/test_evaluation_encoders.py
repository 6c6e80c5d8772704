# SPDX-License-Identifier: Apache-2.0
"""Other systems behind the scorer: saved vectors, callables, HTTP servers; equal to a plain run."""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import FakeEncoder, captions, labels, write_image, write_subset
from PIL import Image

from vlm2vec_jax import evaluate, flags
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.evaluation import inputs as listing
from vlm2vec_jax.evaluation import run
from vlm2vec_jax.evaluation.encoders import Callback, SavedVectors, input_id
from vlm2vec_jax.evaluation.endpoint import Endpoint
from vlm2vec_jax.inputs import BadInputs, MultimodalInput


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, and its scores by the encoder that all others stand in for."""
    root = tmp_path_factory.mktemp("encoders")
    write_subset(root / "data", "ImageNet-1K", labels())
    write_subset(root / "data", "MSCOCO_t2i", captions())
    expected = run.evaluate(FakeEncoder(), root / "data", output=root / "plain")
    return root, root / "data", expected


def call(*argv):
    return flags.call(evaluate.main, evaluate.define, ["evaluate", *map(str, argv)])


def check_scores(folder, expected):
    found = json.loads((folder / "scores.json").read_text())
    assert found["subsets"] == expected["subsets"]
    assert found["averages"] == expected["averages"]


# ---------------------------------------------------------------------------------- saved vectors


def vectors_of(data, tmp_path):
    """The inputs as the command lists them, and the vectors that another system makes of them."""
    argv = ["inputs", "--data", str(data), "--output", str(tmp_path / "in.jsonl")]
    assert flags.call(listing.main, listing.define, argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    matrix = np.stack(
        [FakeEncoder().vector(r["text"], [data / i for i in r["images"]]) for r in rows]
    )
    return rows, matrix


@pytest.mark.parametrize("form", ["npz", "npy", "npy+ids", "embed", "parquet", "columns", "ours"])
def test_saved_vectors_of_every_form(made, tmp_path, form):
    root, data, expected = made
    rows, matrix = vectors_of(data, tmp_path)
    ids = [r["id"] for r in rows]
    assert len(set(ids)) == len(ids) == 24
    more: list = []
    path = tmp_path / "in.npy"
    if form == "npy":  # beside in.jsonl
        np.save(path, matrix)
    elif form == "npy+ids":
        np.save(path := tmp_path / "v.npy", matrix[::-1])
        (tmp_path / "names").write_text("\n".join(ids[::-1]) + "\n")
        more = ["--vector_ids", tmp_path / "names"]
    elif form == "embed":
        np.savez(path := tmp_path / "in.npz", embeddings=matrix)
    elif form == "npz":
        np.savez(path := tmp_path / "v.npz", embeddings=matrix, ids=np.array(ids))
    elif form == "ours":
        run.evaluate(FakeEncoder(), data, ["MSCOCO_t2i"], output=tmp_path / "ours")
        path, more = tmp_path / "ours/MSCOCO_t2i_embeddings.npz", ["--subsets", "MSCOCO_t2i"]
    else:
        columns = {"id": ids}
        if form == "columns":
            columns = {
                "text": [r["text"] for r in rows],
                "image": [(r["images"] or [None])[0] for r in rows],
            }
        columns["embedding"] = list(matrix)
        pq.write_table(pa.table(columns), path := tmp_path / "v.parquet")
    output = tmp_path / "out"
    assert call("--vectors", path, "--data", data, "--output", output, *more) == 0
    found = json.loads((output / "scores.json").read_text())
    for name, subset in found["subsets"].items():
        assert subset == expected["subsets"][name]
    assert form == "ours" or list(found["subsets"]) == list(expected["subsets"])


def test_saved_vectors_that_do_not_fit_are_told(made, tmp_path, capsys):
    root, data, _ = made
    rows, matrix = vectors_of(data, tmp_path)
    ids = [r["id"] for r in rows]
    np.savez(tmp_path / "few.npz", embeddings=matrix[:20], ids=np.array(ids[:20]))
    assert call("--vectors", tmp_path / "few.npz", "--data", data, "--output", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert "(4 problems)" in said and "no vector of id" in said and ".parquet row" in said
    np.savez(tmp_path / "twice.npz", embeddings=matrix[:2], ids=np.array(["a", "a"]))
    np.savez(tmp_path / "short.npz", embeddings=matrix, ids=np.array(["a"]))
    np.savez(tmp_path / "pickled.npz", embeddings=np.array([{}, None], object))
    np.save(tmp_path / "nameless.npy", matrix)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "none.parquet")
    pq.write_table(
        pa.table({"id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}), tmp_path / "odd.parquet"
    )
    for name, words in (
        ("twice.npz", "two different vectors"),
        ("short.npz", "1 ids for vectors of shape"),
        ("pickled.npz", "cannot be read"),
        ("nameless.npy", "--vector_ids"),
        ("bad.parquet", "cannot be read as parquet"),
        ("none.parquet", "needs the columns embedding and id"),
        ("odd.parquet", "different lengths"),
        ("no.npz", "there is no file"),
        ("x.pkl", "are read from"),
    ):
        with pytest.raises(UserError, match=words):
            SavedVectors(tmp_path / name, data)


def test_ids_do_not_depend_on_how_a_path_is_spelled(tmp_path):
    assert input_id("a", ["x/../img/1.png"]) == input_id("a", ["img/1.png"])
    assert input_id("a\n", ["img/1.png"]) != input_id("a", ["img/1.png"])
    assert input_id("a", []) != input_id("a", [""])


# -------------------------------------------------------------------------------------- callables


def test_a_python_callable(made, tmp_path, monkeypatch, capsys):
    root, data, expected = made
    (tmp_path / "their_model.py").write_text(
        "from evaluation_data import FakeEncoder\n"
        "def encode(inputs):\n"
        "    assert all(hasattr(i, 'text') and hasattr(i, 'images') for i in inputs)\n"
        "    return FakeEncoder().encode(inputs).tolist()\n"
        "class Model:\n"
        "    def encode(self, inputs):\n"
        "        return FakeEncoder().encode(inputs)\n"
        "    def fingerprint(self):\n"
        "        return {'weights': 7}\n"
        "def wrong(inputs):\n"
        "    return [[1.0, 2.0]]\n"
        "def words(inputs):\n"
        "    return ['no'] * len(inputs)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("encode", "Model"):
        spec, output = f"their_model:{name}", tmp_path / name
        assert call("--encoder", spec, "--data", data, "--output", output, "--name", "theirs") == 0
        check_scores(output, expected)
    made_with = json.loads((tmp_path / "Model/scores.json").read_text())["fingerprint"]["encoder"]
    assert made_with["callable"] == "theirs" and made_with["weights"] == 7 and made_with["file"]
    capsys.readouterr()
    for spec, words in (
        ("their_model:wrong", "shape (1, 2) for 24 inputs"),
        ("their_model:words", "not an array of numbers"),
        ("their_model:number", "neither callable"),
        ("their_model:none", "has no none"),
        ("no_such_module:f", "cannot import"),
        ("their_model", "write module:function"),
    ):
        assert call("--encoder", spec, "--data", data, "--output", tmp_path / "x") == 2
        assert words in capsys.readouterr().err


def test_a_tensor_of_another_library():
    class Tensor:
        def detach(self):
            return self

        def cpu(self):
            return self

        def __array__(self, dtype=None, copy=None):
            return np.ones((2, 3), dtype)

    found = Callback(lambda inputs: Tensor(), "t").encode([MultimodalInput("a")] * 2)
    assert found.shape == (2, 3) and found.dtype == np.float32


# -------------------------------------------------------------------------------------- endpoints


class Server(http.server.ThreadingHTTPServer):
    """Speaks the three forms; answers with the vectors of the fake encoder.

    Attributes:
      asked: (path, headers, body) of each request.
      plan: how the next requests are answered, from the front: a status, or a function of the
        answer; then all well.
    """

    def __init__(self, tmp_path):
        self.asked, self.plan, self.tmp_path = [], [], tmp_path
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def vector(self, content) -> list[float]:
        """Rebuild text and image from the parts of a message."""
        if isinstance(content, str):
            return FakeEncoder().vector(content).tolist()
        text, files = "", []
        for part in content:
            if part["type"] == "text":
                text += (" " if text.endswith("|>") else "") + part["text"]
            else:
                head, _, data = part["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64"
                raw = base64.b64decode(data)
                path = self.tmp_path / f"{hash(raw)}.png"
                path.write_bytes(raw)
                files.append(path)
                text += f"<|image_{len(files)}|>"
        return FakeEncoder().vector(text, files).tolist()

    def answer(self, path, body):
        if path == "/v2/embed":
            last = [i["content"][-1]["text"] for i in body["inputs"]]
            queries = {"classification" in text or "Find me" in text for text in last}
            assert queries == {body["input_type"] == "search_query"}
            return {"embeddings": {"float": [self.vector(i["content"]) for i in body["inputs"]]}}
        inputs = body.get("input")
        if inputs is None:
            inputs = [body["messages"]]
        contents = [i if isinstance(i, str) else i[0]["content"] for i in inputs]
        data = [{"index": n, "embedding": self.vector(c)} for n, c in enumerate(contents)]
        return {"object": "list", "data": data[::-1], "model": body["model"]}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            step = self.server.plan.pop(0) if self.server.plan else None
        status, reply = 200, b""
        if isinstance(step, int):
            status = step
            reply = json.dumps({"error": {"message": f"it is {step}", "type": "t"}}).encode()
        elif isinstance(step, bytes):
            reply = step
        else:
            answer = self.server.answer(self.path, body)
            reply = json.dumps(step(answer) if step else answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("form", ["messages", "input", "cohere"])
def test_a_server_that_takes_images(made, tmp_path, server, form, monkeypatch):
    root, data, expected = made
    monkeypatch.setenv("THEIR_KEY", "secret")
    argv = ["--endpoint", server.url, "--endpoint_model", "their/model", "--endpoint_format", form]
    argv += ["--api_key_env", "THEIR_KEY", "--data", data, "--output", tmp_path / "out"]
    server.plan = [503, 429]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert call(*argv, "--dimensions", 8) == 0
    check_scores(tmp_path / "out", expected)
    path, headers, body = server.asked[-1]
    assert path == ("/v2/embed" if form == "cohere" else "/v1/embeddings")
    assert headers["Authorization"] == "Bearer secret" and body["model"] == "their/model"
    assert body["output_dimension" if form == "cohere" else "dimensions"] == 8
    assert len(server.asked) == {"messages": 24, "input": 2, "cohere": 2}[form] + 2
    # The key is in no file.
    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in file.read_bytes()


def ask(server, *items, **options):
    options = {"pause_s": 0.0, "retries": 2, "workers": 2, **options}
    return Endpoint(server.url, "m", **options).encode(list(items))


def test_text_and_images_are_sent_in_their_places(server, tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.bmp", "RGB")):
        Image.new(mode, (5, 4), "red").save(tmp_path / name)
    text = "<|image_2|> before\n <|image_1|>\nafter \n"
    ask(server, MultimodalInput(text, (tmp_path / "a.png", tmp_path / "b.bmp")))
    content = server.asked[0][2]["messages"][0]["content"]
    kinds = [p.get("text", "image") for p in content]
    assert kinds == ["image", "before\n ", "image", "\nafter \n"]
    first, second = (base64.b64decode(content[k]["image_url"]["url"].split(",")[1]) for k in (0, 2))
    assert second == (tmp_path / "a.png").read_bytes()
    assert Image.open(io.BytesIO(first)).format == "PNG"  # servers read no BMP
    ask(server, MultimodalInput("only text\n"), MultimodalInput("another"), form="input")
    assert server.asked[1][2]["input"] == ["only text\n", "another"]


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ([401], {}, "refused: 401 .*it is 401"),
        ([500, 502, 503], {}, "failed 3 times, at last: 503"),
        ([b"<html>"], {}, "did not answer with JSON"),
        ([lambda a: {"data": a["data"] * 2}], {}, "no embeddings"),
        ([lambda a: {"data": []}], {}, "0 embeddings for 1"),
        ([lambda a: {"wrong": 1}], {}, "no embeddings for 1"),
        ([], {"dimensions": 9}, "8 dimensions, not the 9"),
        ([lambda a: {"data": [{"index": 0, "embedding": []}]}], {}, r"shape \(0,\)"),
    ],
)
def test_what_a_server_does_wrong_is_told(server, plan, options, words):
    server.plan = list(plan)
    with pytest.raises(UserError, match=words):
        ask(server, MultimodalInput("a"), **options)


def test_answers_in_base64_and_values_that_are_no_numbers(server):
    raw = base64.b64encode(np.arange(3, dtype="<f4").tobytes()).decode()
    server.plan = [lambda a: {"data": [{"index": 0, "embedding": raw}]}]
    np.testing.assert_array_equal(ask(server, MultimodalInput("a")), [[0, 1, 2]])
    server.plan = [lambda a: {"data": [{"index": 0, "embedding": [1.0, None]}]}]
    assert np.isnan(ask(server, MultimodalInput("a"))).tolist() == [[False, True]]
    server.plan = [lambda a: {"data": [{"index": 0, "embedding": [1.0, 2.0]}]}]
    with pytest.raises(UserError, match=r"different lengths: \[2, 8\]"):
        ask(server, MultimodalInput("a"), MultimodalInput("b"), workers=1)


def test_a_server_that_is_silent_or_absent(server):
    gate = threading.Event()

    def silent(answer):
        gate.wait(5)
        return answer

    server.plan = [silent, silent]
    with pytest.raises(UserError, match=r"failed 2 times, at last: no answer within 0\.1 s"):
        ask(server, MultimodalInput("a"), timeout_s=0.1, retries=1)
    gate.set()
    nobody = Endpoint("http://127.0.0.1:9", "m", retries=1, pause_s=0.0)
    with pytest.raises(UserError, match="failed 2 times"):
        nobody.encode([MultimodalInput("a")])
    for url in ("ftp://x", "localhost:80", "/v1"):
        with pytest.raises(UserError, match="--endpoint"):
            Endpoint(url, "m")


def test_images_that_cannot_be_read_are_named_before_they_are_sent(server, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    write_image(tmp_path / "good.png")
    items = [
        MultimodalInput("<|image_1|>", (tmp_path / name,)) for name in ("bad.png", "good.png", "no")
    ]
    with pytest.raises(BadInputs) as caught:
        ask(server, *items)
    assert set(caught.value.problems) == {0, 2}


def test_flags_of_other_systems(made, tmp_path, capsys, monkeypatch):
    root, data, _ = made
    argv = ["--data", data, "--output", tmp_path / "out"]
    monkeypatch.delenv("NO_KEY", raising=False)
    for more, words in (
        ([], "give exactly one of --model, --vectors, --encoder, --endpoint"),
        (["--model", "m", "--vectors", "v"], "exactly one of --model"),
        (["--endpoint", "http://h"], "--endpoint_model"),
        (["--endpoint", "http://h", "--endpoint_model", "m", "--api_key_env", "NO_KEY"], "NO_KEY"),
        (["--model", "m", "--shard", "2/2"], "--shard 2/2"),
        (["--model", "m", "--shard", "x"], "--shard x"),
        (["--model", "m", "--truncate_dims", "a"], "--truncate_dims a"),
        (["--model", "m", "--precisions", "int4"], "'int4'"),
        (["--model", "m", "--process_id", "1"], "num_processes"),
    ):
        assert call(*argv, *more) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
