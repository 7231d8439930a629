"""A real OpenAI-compatible server, `transformers serve`, with a tiny model of known habits as the judge.

Runs where the server's own requirements are installed: pip install "transformers[serving]".
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from judges.conftest import pairs
from pyrite.feedback.judges import JudgeOptions, LanguageJudge
from pyrite.feedback.ledger import GoldStopped, Ledger
from pyrite.jobs.judge import Opinion, leaning

MISSING = [name for name in ("openai", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}")
WORDS = ("<pad>", "<eos>", "<unk>", "A", "B", "TIE", "words")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}judge :"


def save_judge(folder: Path) -> None:
    """A Llama that says A and ends, whatever it reads: each token's embedding chooses the next one."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=4096, eos_token_id=1, pad_token_id=0, **sizes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[WORDS.index("A")] = torch.eye(16)[1]
        model.lm_head.weight[WORDS.index("A"), 0] = 10
        model.lm_head.weight[WORDS.index("<eos>"), 1] = 10
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model of a running server."""
    folder = tmp_path_factory.mktemp("served")
    save_judge(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            time.sleep(0.1)
            if process.poll() is not None:
                pytest.skip(f"transformers serve does not start: {log.read_text()[-200:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                pass
        else:
            pytest.skip("transformers serve does not answer within a minute")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def test_a_served_model_judges(served: tuple[str, str], tmp_path: Path) -> None:
    url, model = served
    texts = pairs(6)
    options = JudgeOptions(base_url=url, max_tokens=8, price_in=1.0, price_out=1.0, concurrency=2)
    judge = LanguageJudge(model, "more words", None, options, str(tmp_path / "j.db"))
    verdicts = judge.verdicts(*texts)
    assert {verdict.raw for verdict in verdicts} == {("A", "A")}
    assert [verdict.preference for verdict in verdicts] == [0] * 6
    with Ledger(judge.ledger) as ledger:
        books = ledger.books()
    assert (books.answered, books.calls, books.lost, books.at_risk) == (12, 12, 0, pytest.approx(0.0))
    assert books.cost == pytest.approx((books.tokens_in + books.tokens_out) / 1e6)
    opinions = [Opinion(str(i), (str(i), ""), one.preference, one.p_ab, one.p_ba) for i, one in enumerate(verdicts)]
    found = leaning(opinions, n_boot=50, level=0.95, generator=torch.Generator().manual_seed(0))
    assert (found["first_shown"]["value"], found["consistency"]["value"]) == (1.0, 0.0)


def test_a_model_that_is_not_served(served: tuple[str, str], tmp_path: Path) -> None:
    options = JudgeOptions(base_url=served[0], backoff=0.01)
    judge = LanguageJudge("nothing/of-that-name", "more words", None, options, str(tmp_path / "j.db"))
    with pytest.raises(GoldStopped, match="of-that-name"):
        judge(*pairs(6))
