"""What is read from a folder before the model is served, and what an error looks like."""

import json

import pytest

from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.source import read_folder_config
from dsjax.data.tokenizer import BOS, EOS, load_tokenizer
from dsjax.errors import UserError
from dsjax.serving.protocol import RequestError, load_served
from tests.data.spoken import TEMPLATE, ids, tokenizer
from tests.serving.checkpoints import write_checkpoint

HI = [{"role": "user", "content": "hi"}]


def load(folder, config=None, **files):
    """A folder with a tokenizer and these files; what is served from it."""
    tokenizer().save(folder)
    names = {"bos_token": BOS, "eos_token": EOS, **(config or {})}
    write = {"tokenizer_config.json": json.dumps(names), **files}
    for name, text in write.items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_served(folder, "m", vocab_size=400, context=50)


def test_a_released_folder(tmp_path):
    generation = {
        "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True,
        "temperature": 0.6, "top_p": 0.95, "top_k": None, "transformers_version": "4.46.3",
    }  # fmt: skip
    config = {"chat_template": TEMPLATE, "add_bos_token": False}
    served = load(tmp_path, config, **{"generation_config.json": json.dumps(generation)})
    assert (served.name, served.vocab_size, served.context, served.add_bos) == ("m", 400, 50, False)
    assert served.defaults == {"temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}
    assert served.stop_tokens == (1,)
    assert [served.think_start_id, served.think_end_id] == ids("<think></think>")
    assert served.template.encode(HI) == ids(f"{BOS}<｜User｜>hi<｜Assistant｜><think>\n")


def test_converted_weights_are_served_like_the_folder_they_were_made_of(tmp_path):
    folder = write_checkpoint(tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    convert(folder, tmp_path / "ours")
    kept, served = (
        load_served(path, "m", vocab_size=320, context=50) for path in (folder, tmp_path / "ours")
    )
    assert served.defaults == kept.defaults == {"temperature": 0.6}
    assert served.template.encode(HI) == kept.template.encode(HI)
    assert load_tokenizer(tmp_path / "ours").digest == load_tokenizer(folder).digest
    assert read_folder_config(tmp_path / "ours") == read_folder_config(folder)


def test_a_run_directory_keeps_its_tokenizer_apart_and_has_no_template(tmp_path):
    tokenizer().save(tmp_path / "tokenizer")
    served = load_served(tmp_path, "run", vocab_size=400, context=50)
    assert served.tokenizer.digest == tokenizer().digest
    assert (served.template, served.defaults, served.add_bos) == (None, {}, True)


def test_the_template_may_be_in_any_of_three_files(tmp_path):
    def first(folder, **files):
        folder.mkdir()
        return load(folder, **files).template.render([])

    inside = {"chat_template": "config"}
    beside = {"chat_template.json": json.dumps({"chat_template": "json"})}
    alone = {"chat_template.jinja": "jinja"}
    assert first(tmp_path / "a", config=inside) == "config"
    assert first(tmp_path / "b", config=inside, **beside) == "config"
    assert first(tmp_path / "c", config=inside, **beside, **alone) == "jinja"
    assert first(tmp_path / "e", **beside) == "json"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert first(tmp_path / "d", config={"chat_template": named}) == "b"


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"chat_template": "{% for %}"}, {}, "the chat template cannot be read"),
        ({"chat_template": 5}, {}, "chat_template is no text"),
        ({"chat_template": [{"name": "default"}]}, {}, "chat_template is no text"),
        ({}, {"generation_config.json": "{"}, r"generation_config\.json: not the JSON"),
        ({}, {"generation_config.json": "[]"}, "expected a JSON object, found list"),
        ({}, {"generation_config.json": '{"temperature": -1}'}, "temperature: Input should be"),
        ({}, {"generation_config.json": '{"top_p": NaN}'}, "NaN is not JSON"),
        ({}, {"chat_template.json": "5"}, r"chat_template\.json: expected a JSON object"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, config, files, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, config, **files)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_served(tmp_path, "m", vocab_size=400, context=50)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    tokenizer().save(tmp_path)
    with pytest.raises(UserError, match=r"chat_template\.jinja: cannot be read"):
        load_served(tmp_path, "m", vocab_size=400, context=50)


def test_only_byte_level_tokenizers_are_served(tmp_path):
    tokenizer().save(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    tree["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(UserError, match="not byte-level"):
        load_served(tmp_path, "m", vocab_size=400, context=50)


def test_an_error_is_written_as_openai_writes_it():
    error = RequestError(404, "no such model", "model", "model_not_found")
    assert error.body() == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert RequestError(503, "busy").body()["error"]["type"] == "server_error"
