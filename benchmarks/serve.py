"""Throughput of `hymba serve` with one client and with several at once.

    python -m benchmarks.serve

Starts a server of its own (or measures the one at `--url`) and asks it with the `openai` client: streamed chat
completions of a fixed number of tokens, greedy, no answer ending early. First checks that the answers of many clients
at once are those of one client; prints no number when they are not. The line "without a server" is `generate` on the
same prompt in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.common import report

QUESTIONS = ["What is a list?", "Write a function.", "Sort these numbers.", "Explain the error."]
_START_S = 120


@dataclass
class Timed:
    """An answer: its text, tokens, and the seconds to its first piece and to its end."""

    text: str
    tokens: int
    first: float
    seconds: float


def ask(client: Any, model: str, question: str, tokens: int, banned: Sequence[int]) -> Timed:
    """One streamed chat completion of exactly `tokens` tokens."""
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        logit_bias={str(token): -100 for token in banned},
        stream=True,
    )
    text, first, usage = "", 0.0, None
    for chunk in stream:
        if chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    return Timed(text, usage.completion_tokens, first, time.perf_counter() - started)


def measured(
    client: Any, model: str, clients: int, requests: int, tokens: int, banned: Sequence[int]
) -> dict[str, Any]:
    """Tokens per second of `clients` that ask `requests` times each, all at once."""
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(clients * requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda question: ask(client, model, question, tokens, banned), questions))
    seconds = time.perf_counter() - started
    made = sum(answer.tokens for answer in answers)
    return {
        "clients": clients,
        "requests": len(answers),
        "tokens": made,
        "tokens_per_s": made / seconds,
        "first_token_s": statistics.median(answer.first for answer in answers),
        "answer_s": statistics.median(answer.seconds for answer in answers),
    }


def check(client: Any, model: str, clients: int, tokens: int, banned: Sequence[int]) -> None:
    """Answers of many at once against answers of one at a time, and all of them as long as asked for."""
    alone = {question: ask(client, model, question, tokens, banned) for question in QUESTIONS}
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(lambda question: ask(client, model, question, tokens, banned), questions))
    for question, answer in zip(questions, together, strict=True):
        if answer.text != alone[question].text:
            sys.exit(f"{question!r} has another answer among {clients} clients than alone; no number")
        if answer.tokens != tokens:
            sys.exit(f"an answer ended after {answer.tokens} tokens instead of {tokens}; no number")


@contextlib.contextmanager
def server(options: Sequence[str]) -> Iterator[str]:
    """A `hymba serve` of its own; yields its address."""
    command = [sys.executable, "-m", "hymba", "serve", "--port", "0", "--log-level", "warning", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"serving .* at (http\S+)", line):
                break
        else:
            sys.exit("".join(said).strip().splitlines()[-1])
        _wait(found[1].removesuffix("/v1") + "/health")
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=_START_S)


def _wait(url: str) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    end = time.monotonic() + _START_S
    while True:
        try:
            urlopen(url, timeout=5).close()
            return
        except URLError:
            if time.monotonic() > end:
                sys.exit(f"no server at {url} after {_START_S} s")
            time.sleep(0.1)


def without_a_server(model: str | None, dtype: str, device: str, tokens: int, repeats: int) -> tuple[float, list[int]]:
    """Tokens per second of `generate` on the first question, and the ids that end an answer."""
    import torch

    from hymba.chat import Conversation, generation_settings
    from hymba.commands.models import load, locate

    network, tokenizer = load(locate(model), dtype=dtype, device=device)
    settings = generation_settings(network, tokenizer, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    if network.device.type == "cuda":
        settings.cache_implementation = "static"
    template = Conversation(network, tokenizer).template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], chat_template=template, add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )["input_ids"].to(network.device)  # fmt: skip
    rates = []
    with network.frozen_meta_state():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            new = network.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
            rates.append((new.shape[1] - prompt.shape[1]) / (time.perf_counter() - started))
    return statistics.median(rates[1:]), list(settings.eos_token_id or ())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; by default the model inside the package")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--url", help="measure a server that runs already, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    chosen = parser.parse_args(arguments)
    import openai

    rows: list[dict[str, Any]] = []
    banned: list[int] = [2]
    if chosen.url is None:
        rate, banned = without_a_server(chosen.model, chosen.dtype, chosen.device, chosen.tokens, chosen.requests)
        rows.append({"clients": 0, "tokens_per_s": rate})
        print(f"without a server: {rate:7.1f} tokens/s")
    options = ["--dtype", chosen.dtype, "--device", chosen.device]
    options += ["--model", chosen.model] if chosen.model else []
    running = contextlib.nullcontext(chosen.url) if chosen.url else server(options)
    with running as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        name = client.models.list().data[0].id
        check(client, name, max(chosen.clients), chosen.tokens, banned)
        for clients in chosen.clients:
            row = measured(client, name, clients, chosen.requests, chosen.tokens, banned)
            rows.append(row)
            print(
                f"{clients:2d} client{'s' if clients > 1 else ' '}:       {row['tokens_per_s']:7.1f} tokens/s in all, "
                f"first piece after {row['first_token_s']:.3f} s, answer of {chosen.tokens} tokens after "
                f"{row['answer_s']:.2f} s (medians)"
            )
    report("serve", rows, model=name, tokens=chosen.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
