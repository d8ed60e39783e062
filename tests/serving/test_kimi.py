"""A folder with Kimi's tiktoken file is served as one with a tokenizer.json."""

from pathlib import Path

from dsjax.checkpoint.convert import convert
from dsjax.serving.protocol import Served, load_served
from tests.data.kimi import NAMES, NOT_SPECIAL, write_kimi
from tests.serving.checkpoints import write_checkpoint

PIECES = [*(bytes([byte]) for byte in range(256)), b"He", b"Hello"]
FIRST = len(PIECES)
IDS = {name: FIRST + place for place, name in (NAMES | NOT_SPECIAL).items()}

# In the manner of Kimi-K2's.
TEMPLATE = """\
{%- for message in messages -%}
<|im_{{ message['role'] }}|>{{ message.get('name') or message['role'] }}<|im_middle|>
{{- message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""


def write(folder: Path) -> Path:
    write_checkpoint(folder, template=None)
    (folder / "tokenizer.json").unlink()
    write_kimi(folder, PIECES, chat_template=TEMPLATE)
    (folder / "tokenization_kimi.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return folder


def spelled(text: str) -> list[int]:
    return list(text.encode())


def assert_served(served: Served) -> None:
    assert served.template is not None
    said = [{"role": "user", "content": "Hello<|im_end|>"}]
    assert served.template.encode(said) == [
        *(IDS["<|im_user|>"], *spelled("user"), IDS["<|im_middle|>"]),
        *(PIECES.index(b"Hello"), *spelled("<|im_end|>"), IDS["<|im_end|>"]),
        *(IDS["<|im_assistant|>"], *spelled("assistant"), IDS["<|im_middle|>"]),
    ]
    assert served.tokenizer.eos_id == IDS["[EOS]"]


def test_it_is_served_and_none_of_its_code_is_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "kimi")
    assert_served(load_served(folder, "kimi", vocab_size=320, context=64))
    assert not (folder / "ran").exists()


def test_the_tokenizer_travels_through_a_conversion(tmp_path: Path) -> None:
    folder = write(tmp_path / "kimi")
    convert(folder, tmp_path / "ours")
    assert_served(load_served(tmp_path / "ours", "kimi", vocab_size=320, context=64))
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("tiktoken.model", "tokenizer_config.json", "tokenization_kimi.py"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
